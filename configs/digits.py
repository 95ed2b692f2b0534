"""A classifier of handwritten digits, 8 × 8 pixels as overlapping patches.

  python train.py --config=configs/digits.py --workdir=runs/digits

| size | layers × heads × width, patches, batch, steps | parameters |
|---|---|---|
| (default) | 2 × 4 × 64, 25 of 4 × 4 pixels, 64, 1,000 | 103,434 |
| debug | 1 × 2 × 16, 9, 8, 30 | 4 k |

Accuracy on a random fifth, held out by --config.seed: 98.3%, 98.6% and 99.4%
for seeds 0, 1 and 2, 98.8% on average; 35 s for seed 0. plots/confusion.png
shows which digits are confused. Measured on 2026-11-21, two cores of an AMD
EPYC, JAX 0.10.2.
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
      'task': 'classification',
      'seed': 0,  # also selects the held-out fifth
      'data': {
        'kind': 'digits',
        'path': '',  # unused: scikit-learn contains the digits
        'patch_size': 4,
        'stride': 1,
        'is_shifted': True,  # training images by up to a pixel
        'batch_size': 64,
      },
      'model': {
        'num_layers': 2,
        'num_heads': 4,
        'model_size': 64,
        'pooling': 'mean',  # or 'first'
        'mixer': 'attention',  # or 'lstm', 'conv'
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
        'dropout_rate': 0.1,
      },
      'optimizer': {
        'learning_rate': 2e-3,
        'warmup_steps': 100,
        'final_fraction': 0.0,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.99,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 1_000,
        'log_every': 100,
        'eval_every': 250,
        'checkpoint_every': 500,
        'steps_per_call': 20,
      },
    }
  )


def _debug():
  config = _default()
  config.data.update({'stride': 2, 'batch_size': 8})
  config.model.update({'num_layers': 1, 'num_heads': 2, 'model_size': 16})
  config.optimizer.update({'warmup_steps': 5})
  config.training.update(
    {'steps': 30, 'log_every': 5, 'eval_every': 15, 'checkpoint_every': 10}
  )
  return config
