"""Llama 3 8B's shape (Llama team 2024, "The Llama 3 herd of models", table 3).

  python -m attention inspect --config=configs/llama3_8b.py

| size | layers × heads (key heads) × width, context | parameters |
|---|---|---|
| (default) | 32 × 32 (8) × 4,096, 8,192 | 8,030,261,248 |
| debug | 2 × 4 (2) × 16, 16 | 15 k |

The published files have the vocabulary and rotary base given here; a folder of
them is read by `--model=FOLDER` and by configs/finetune.py, whatever this file
says. Batch size and learning rate are the paper's first ones, the steps are its
15 T tokens in batches of 16 M. The default size has not been trained.
"""

import ml_collections

_MIXED = 'params=float32,compute=bfloat16,output=float32'


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '' or 'debug'."""
  sizes = {'': _default, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  context_size = ml_collections.FieldReference(8192)
  return ml_collections.ConfigDict(
    {
      'task': 'language',
      'seed': 0,
      'data': {
        'path': '',  # a UTF-8 text; '': the Python standard library's source
        'level': 'bytes',  # or a tokenizer.json
        'context_size': context_size,
        'batch_size': 512,  # about 4 M tokens, as at first in the paper
      },
      'model': {
        'vocab_size': 128_256,
        'context_size': context_size,
        'num_layers': 32,
        'num_heads': 32,
        'model_size': 4096,
        'hidden_size': 14_336,
        'positions': 'rotary',
        'norm': 'pre',
        'norm_kind': 'rms',
        'norm_epsilon': 1e-5,
        'activation': 'swiglu',
        'with_feed_forward_bias': False,
        'attention': {
          'num_kv_heads': 8,
          'with_bias': False,
          'with_output_bias': False,
          'rotary': {
            'base': 500_000.0,
            'pairs': 'halves',
            'scaling': 'none',  # llama3, of Llama 3.1, to 131,072 tokens
            'factor': 1.0,  # 8 in Llama 3.1
            'original_length': 8192,
          },
          'implementation': '',  # fused, chunked, reference; '': the default
        },
        'with_tied_output': False,
        'fused_qkv': False,
        'use_scan': True,  # compile one block for all layers
        'use_remat': True,  # recompute blocks: less memory, more time
      },
      'optimizer': {
        'learning_rate': 3e-4,
        'warmup_steps': 2_000,
        'final_fraction': 0.1,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.95,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 900_000,
        'log_every': 100,
        'eval_every': 1_000,
        'checkpoint_every': 1_000,
        'precision': _MIXED,
      },
    }
  )


def _debug():
  config = _default()
  config.data.update({'context_size': 16, 'batch_size': 4})
  config.model.update(
    {
      'vocab_size': 300,
      'num_layers': 2,
      'num_heads': 4,
      'model_size': 16,
      'hidden_size': 40,
    }
  )
  config.model.attention.update({'num_kv_heads': 2})
  config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 5})
  config.training.update(
    {
      'steps': 30,
      'log_every': 5,
      'eval_every': 15,
      'checkpoint_every': 10,
      'precision': '',
    }
  )
  return config
