"""A trained GPT, trained further on a text: all of it, or low-rank updates.

  python train.py --config=configs/finetune.py --workdir=runs/tuned \\
    --config.init.path=runs/gpt_char --config.data.path=input.txt

| size | what is trained |
|---|---|
| (default) | all parameters |
| lora | low-rank updates of all linear layers, rank 2 |
| debug | low-rank updates of rank 1, 30 steps |
"""

import ml_collections


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '', 'lora' or 'debug'."""
  sizes = {'': _default, 'lora': _lora, 'debug': _debug}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  return ml_collections.ConfigDict(
    {
      'task': 'language',
      'seed': 0,
      # Required: the workdir of an earlier run of a GPT, or a folder with
      # config.json, *.safetensors and tokenizer.json. They give the model's
      # fields, parameters and vocabulary, and are not needed afterwards.
      'init': {'path': ''},
      'data': {
        'path': '',  # a UTF-8 text; '': the Python standard library's source
        'level': '',  # 'bytes' or a path, if the folder has no tokenizer.json
        'context_size': 0,  # tokens per window; 0: as many as the model reads
        'batch_size': 12,
      },
      # Replaces the model's own fields.
      'model': {
        'lora': {
          'rank': 0,  # 0: all parameters are trained
          'alpha': 16.0,  # updates are scaled by alpha / rank
          'projections': (),  # ('query', 'value'), …; (): all linear layers
        },
        'dropout_rate': 0.0,
        'implementation': '',  # fused, chunked, reference; '': the default
        'use_scan': False,  # compile one block for all layers
        'use_remat': False,  # recompute blocks: less memory, more time
      },
      'optimizer': {
        'learning_rate': 1e-3,
        'warmup_steps': 50,
        'final_fraction': 0.1,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.99,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 1_000,
        'log_every': 100,
        'eval_every': 500,
        'checkpoint_every': 500,
      },
    }
  )


def _lora():
  config = _default()
  config.model.lora.rank = 2
  config.optimizer.update({'learning_rate': 1e-2, 'weight_decay': 0.0})
  return config


def _debug():
  config = _lora()
  config.data.batch_size = 4
  config.model.lora.rank = 1
  config.optimizer.update({'warmup_steps': 5})
  config.training.update(
    {'steps': 30, 'log_every': 5, 'eval_every': 15, 'checkpoint_every': 10}
  )
  return config
