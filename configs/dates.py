"""Dates in eleven languages and many formats to ISO 8601, byte by byte.

python train.py --config=configs/dates.py --workdir=runs/dates
echo "mercredi 5 mars 1997" | python -m attention translate --workdir=runs/dates

Default size (2 + 2 layers of width 64, 1,500 steps): 85.7% of 1,000 held-out
dates are exact at step 500, 99.8% at step 1,000 and at the end; 72% in
languages that are absent from training; 1 min 26 s. Measured on 2026-11-21, two
cores of an AMD EPYC, JAX 0.10.2.
"""

import ml_collections


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '' or 'debug'."""
  sizes = {'': _default, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  return ml_collections.ConfigDict(
    {
      'task': 'translation',
      'seed': 0,
      'data': {
        'path': '',  # '': generated dates; otherwise see configs/translate.py
        'embedded': 'dates',
        'num_pairs': 30_000,  # for training
        'level': 'bytes',
        'max_length': 64,  # tokens
        'batch_tokens': 4_096,  # of source and target together
        'num_buckets': 2,  # shapes of batches
      },
      'model': {
        'num_layers': 2,
        'num_heads': 4,
        'model_size': 64,
        'hidden_size': 128,
        'dropout_rate': 0.0,
        'positions': 'sinusoidal',  # learned, rotary, alibi, t5, none
        'norm': 'pre',  # 'post'
        'norm_kind': 'layer',  # 'rms'
        'activation': 'relu',  # gelu, silu, geglu, swiglu
        'window': 0,  # reach of self-attention in tokens; 0: unlimited
        'attention': {
          'similarity': 'scaled_dot',  # dot, cosine, general, additive
          'num_kv_heads': 0,  # a divisor of num_heads; 0: num_heads
          'with_qk_norm': False,  # RMS norm of queries and keys
          'with_sinks': False,  # a learned extra logit per head
          'logit_cap': 0.0,  # c · tanh(logits / c); 0: none
          'value_factorisation': 'low_rank',  # 'full'
          'implementation': 'reference',  # fused, chunked; '': the default
        },
      },
      'loss': {'label_smoothing': 0.0},
      'optimizer': {
        'learning_rate': 4e-3,
        'warmup_steps': 100,
        'final_fraction': 0.02,
        'weight_decay': 0.01,
        'b1': 0.9,
        'b2': 0.98,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 1_500,
        'log_every': 100,
        'eval_every': 500,
        'checkpoint_every': 500,
        'steps_per_call': 20,
      },
    }
  )


def _debug():
  config = _default()
  config.data.update({'num_pairs': 64, 'batch_tokens': 512, 'num_buckets': 1})
  config.model.update({'num_layers': 1, 'num_heads': 2, 'model_size': 16})
  config.optimizer.update({'warmup_steps': 5})
  config.training.update(
    {
      'steps': 20,
      'log_every': 5,
      'eval_every': 10,
      'checkpoint_every': 10,
    }
  )
  return config
