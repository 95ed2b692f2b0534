"""GPT-3's shape (Brown et al. 2020, table 2.1), for counting.

  python -m attention inspect --config=configs/gpt3.py

| size | layers × heads × width, context | parameters |
|---|---|---|
| (default) | 96 × 96 × 12,288, 2,048 | 174,604,259,328 |
| debug | 2 × 2 × 16, 16 | 12 k |

GPT-3 alternates dense and banded attention; here all layers are dense, which
does not change the parameters. Batch size, learning rate and steps are the
paper's. The data is bytes, as the paper's tokens are not published. The default
size has not been trained.
"""

import ml_collections


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '' or 'debug'."""
  sizes = {'': _default, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  context_size = ml_collections.FieldReference(2048)
  return ml_collections.ConfigDict(
    {
      'task': 'language',
      'seed': 0,
      'data': {
        'path': '',  # a UTF-8 text; '': the Python standard library's source
        'level': 'bytes',
        'context_size': context_size,
        'batch_size': 1_600,  # about 3.2 M tokens
      },
      'model': {
        'vocab_size': 50_257,
        'context_size': context_size,
        'num_layers': 96,
        'num_heads': 96,
        'model_size': 12_288,
        'positions': 'learned',  # sinusoidal, rotary, alibi, t5, none
        'norm': 'pre',  # 'post'
        'norm_kind': 'layer',  # 'rms'
        'activation': 'gelu',  # relu, silu, geglu, swiglu
        'window': 0,  # reach of self-attention in tokens; 0: unlimited
        'attention': {
          'similarity': 'scaled_dot',  # dot, cosine, general, additive
          'num_kv_heads': 0,  # a divisor of num_heads; 0: num_heads
          'with_qk_norm': False,  # RMS norm of queries and keys
          'with_sinks': False,  # a learned extra logit per head
          'logit_cap': 0.0,  # c · tanh(logits / c); 0: none
          'value_factorisation': 'low_rank',  # 'full'
          'implementation': '',  # fused, chunked, reference; '': the default
        },
        'dropout_rate': 0.0,
        'with_tied_output': True,
        'fused_qkv': False,
      },
      'optimizer': {
        'learning_rate': 6e-5,
        'warmup_steps': 115,  # 375 M tokens
        'final_fraction': 0.1,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.95,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 91_500,  # 300 G tokens
        'log_every': 100,
        'eval_every': 1_000,
        'checkpoint_every': 1_000,
      },
    }
  )


def _debug():
  config = _default()
  config.data.update({'context_size': 16, 'batch_size': 4})
  config.model.update(
    {'vocab_size': 300, 'num_layers': 2, 'num_heads': 2, 'model_size': 16}
  )
  config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 5})
  config.training.update(
    {'steps': 30, 'log_every': 5, 'eval_every': 15, 'checkpoint_every': 10}
  )
  return config
