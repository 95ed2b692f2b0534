"""Contacts and masked residues of protein families, by an Evoformer.

  python train.py --config=configs/msa.py --workdir=runs/msa
  python -m attention contacts --workdir=runs/msa --alignment=FAMILY.a3m

| size | model, steps |
|---|---|
| (default) | 2 blocks, alignment width 64, pair width 32; 2,000 of 4 families |
| alphafold | AlphaFold's 48 blocks and 4 extra blocks, widths 256 and 128 |
| debug | 2 blocks and an extra block of width 8, 10 |

The default learns from 8,000 generated families of 32 sequences and 64
residues. On 64 others:

| | model | baseline |
|---|---|---|
| precision of the top L/2 contacts, separation 6 or more | 0.747 | 0.214 |
| the same, 24 or more | 0.550 | 0.140 |
| accuracy of masked residues | 0.491 | 0.391 |

The baselines are mean-field DCA of the same sequences, unmasked, and the most
frequent residue of each column. Training took 27 min 17 s beside other work, on
2026-11-26, two cores of an AMD EPYC, JAX 0.10.2.

Loss after 2,000 steps without a part, with --config.seed=0, 1, 2, which also
draw other families; means of the accuracy and of the top L/2:

| --config.model.evoformer… | loss | accuracy | top L/2 |
|---|---|---|---|
| whole | 4.554, 4.519, 4.529 | 0.492 | 0.746 |
| .gating=False | 4.559, 4.525, 4.527 | 0.492 | 0.735 |
| .with_pair_bias=False | 4.737, 4.656, 4.654 | 0.455 | 0.734 |
| .with_triangles=False | 4.776, 4.791, 4.774 | 0.484 | 0.592 |

With --config.training.precision=params=float32,compute=bfloat16,output=float32
the held-out loss after 300 steps is 5.071, and 5.073 in float32. These were
measured on 2026-11-26, an NVIDIA H200, JAX 0.11.2.

A training step of the size alphafold at 128 sequences × 256 residues with 4
blocks takes 983 MiB of temporaries, and 26,717 with
--config.model.evoformer.implementation=reference and .remat=False, which store
all logits and hidden layers (compiled on CPUs, JAX 0.10.2).
"""

import ml_collections


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '', 'alphafold' or 'debug'."""
  sizes = {'': _default, 'alphafold': _alphafold, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  return ml_collections.ConfigDict(
    {
      'task': 'msa',
      'seed': 0,
      'data': {
        'path': '',  # a folder of alignments and structures; '': generated
        'num_families': 8_000,  # generated ones to train on
        'num_held_out': 64,  # others, to evaluate on
        'num_sequences': 32,  # of a generated family
        'num_seq': 32,  # rows of a sample
        'num_extra': 0,  # rows of its extra alignment
        'num_res': 64,  # columns of a sample
        'mask_rate': 0.15,
        'batch_size': 4,
      },
      'model': {
        'msa_size': 64,
        'pair_size': 32,
        'extra_msa_size': 32,
        'num_blocks': 2,
        'num_extra_blocks': 0,
        'max_relative': 32,  # positions
        'evoformer': {
          'num_msa_head': 4,
          'num_pair_head': 4,
          'num_outer_channel': 8,
          'num_intermediate_channel': 32,  # of triangle multiplication
          'num_intermediate_factor': 2,  # of transitions
          'msa_dropout_rate': 0.0,
          'pair_dropout_rate': 0.0,
          'gating': True,
          'with_pair_bias': True,
          'with_triangles': True,
          'outer_first': False,
          'fuse_projection_weights': False,
          'implementation': '',
          'remat': True,
        },
        'params': '',  # AlphaFold's, an .npz file; '': random
        'msa_weight': 1.0,
        'distogram_weight': 1.0,
      },
      'optimizer': {
        'learning_rate': 3e-3,
        'warmup_steps': 100,
        'final_fraction': 0.0,
        'weight_decay': 0.0,
        'b1': 0.9,
        'b2': 0.99,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 2000,
        'log_every': 50,
        'eval_every': 500,
        'checkpoint_every': 500,
      },
    }
  )


def _alphafold():
  config = _default()
  config.data.update({'num_seq': 128, 'num_extra': 1024, 'num_res': 256})
  config.data.update({'num_sequences': 1152, 'batch_size': 1})
  config.model.update(
    {
      'msa_size': 256,
      'pair_size': 128,
      'extra_msa_size': 64,
      'num_blocks': 48,
      'num_extra_blocks': 4,
      'msa_weight': 2.0,
      'distogram_weight': 0.3,
    }
  )
  config.model.evoformer.update(
    {
      'num_msa_head': 8,
      'num_pair_head': 4,
      'num_outer_channel': 32,
      'num_intermediate_channel': 128,
      'num_intermediate_factor': 4,
      'msa_dropout_rate': 0.15,
      'pair_dropout_rate': 0.25,
    }
  )
  config.optimizer.update(
    {'learning_rate': 1e-3, 'clip_norm': 0.1, 'warmup_steps': 1_000}
  )
  return config


def _debug():
  config = _default()
  config.data.update(
    {
      'num_families': 8,
      'num_held_out': 3,
      'num_sequences': 6,
      'num_seq': 4,
      'num_extra': 2,
      'num_res': 30,
      'batch_size': 2,
    }
  )
  config.model.update(
    {
      'msa_size': 8,
      'pair_size': 8,
      'extra_msa_size': 8,
      'num_blocks': 2,
      'num_extra_blocks': 1,
    }
  )
  config.optimizer.update({'warmup_steps': 2})
  config.training.update(
    {'steps': 10, 'log_every': 5, 'eval_every': 5, 'checkpoint_every': 5}
  )
  return config
