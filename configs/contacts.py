"""Contacts in a protein family, from its alignment alone.

  python train.py --config=configs/contacts.py --workdir=runs/contacts \\
    --config.data.path=FAMILY.a3m
  python -m attention contacts --workdir=runs/contacts --structure=FILE.cif \\
    --chain=A

| size | model, steps of 256 sequences |
|---|---|
| (default) | factored attention, 64 heads of 32 channels, 200 |
| potts | one free coupling per pair of positions and residues, 100 |
| debug | factored attention, 4 heads of 8, a short family, 10 |

Fraction of true contacts among the top L pairs, at separations of 6 or more;
24 or more. 6kwc has 1,428 sequences of 191 columns and a predicted structure,
4i6p 865 of 88 and 4zey 401 of 84, both experimental:

| family | mean-field DCA | factored attention | potts | seconds |
|---|---|---|---|---|
| 6kwc | 0.55; 0.36 | 0.50; 0.34 | 0.60; 0.43 | 171, 65 |
| 4i6p | 0.25; 0.24 | 0.23; 0.26 | 0.23; 0.28 | 48, 23 |
| 4zey | 0.10; 0.07 | 0.18; 0.10 | 0.19; 0.13 | 45, 23 |

The generated family, 1,000 sequences of 100 columns: mean-field DCA 0.40; 0.32,
factored attention 0.46; 0.34 in 58 s, potts 0.49; 0.35 in 23 s.

With --config.training.steps=400 factored attention reaches 0.53; 0.36, 0.24;
0.26 and 0.18; 0.13 in 366, 75 and 70 s.

Seeds move 4i6p's figures by a pair or two of 88. Seconds are of the whole
training process. Measured on 2026-11-26, two cores of an AMD EPYC, JAX 0.10.2.
The decays were chosen on these families.
"""

import ml_collections


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '', 'potts' or 'debug'."""
  sizes = {'': _default, 'potts': _potts, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  return ml_collections.ConfigDict(
    {
      'task': 'contacts',
      'seed': 0,
      'data': {
        'path': '',  # .a3m, .fasta, .sto, also with .gz; '': generated
        'length': 100,  # of the generated family
        'num_sequences': 1_000,
        'batch_size': 256,
      },
      'model': {
        'kind': 'factored_attention',  # 'potts'
        'num_heads': 64,  # of factored attention, as is key_size
        'key_size': 32,  # per head
        'decay': 30.0,  # penalty of an alignment: decay / 2 · Σ couplings²
      },
      'optimizer': {
        'learning_rate': 0.03,
        'warmup_steps': 10,
        'final_fraction': 0.0,
        'weight_decay': 0.0,
        'b1': 0.9,
        'b2': 0.99,
        'clip_norm': 1e9,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 200,
        'log_every': 20,
        'eval_every': 100,
        'checkpoint_every': 200,
        'cpu_devices': 1,  # two would compute the couplings twice
      },
    }
  )


def _potts():
  config = _default()
  config.model.update({'kind': 'potts', 'decay': 80.0})
  config.optimizer.update({'learning_rate': 0.05})
  config.training.update({'steps': 100, 'log_every': 10})
  return config


def _debug():
  config = _default()
  config.data.update({'length': 40, 'num_sequences': 50, 'batch_size': 8})
  config.model.update({'num_heads': 4, 'key_size': 8})
  config.training.update(
    {'steps': 10, 'log_every': 5, 'eval_every': 5, 'checkpoint_every': 5}
  )
  return config
