"""A trained GPT, trained further on a text: all of it, or low-rank updates.

  python train.py --config=configs/finetune.py --workdir=runs/tuned \\
    --config.init.path=runs/gpt_char --config.data.path=input.txt

| size | what is trained |
|---|---|
| (default) | all parameters |
| lora | low-rank updates of all linear layers, rank 2 |
| debug | low-rank updates of rank 1, 30 steps |

From Python's standard library to Tiny Shakespeare, in bytes. The first run:
  python train.py --config=configs/gpt_char.py --workdir=runs/base \\
    --config.data.level=bytes --config.training.steps=1500
It ends at 1.734 nats per byte of its own text. Then, with
--config.init.path=runs/base and --config.optimizer.learning_rate=RATE, nats per
byte of the last tenth of Shakespeare before and after 1,000 steps:

| trained | parameters | before | after, by rate |
|---|---|---|---|
| all | 834,304 | 2.818 | 1.795 at 4e-3, 1.823 at 2e-3, 1.868 at 1e-3 |
| lora | 16,384 (1.93%) | 2.818 | 2.047 at 1e-2, 2.065 at 2e-2, 2.798 at 4e-2 |

So low-rank updates end 14% above the training of all parameters: this small
model knows code only, and 2% of it hold little of another language. Tried
without reaching 3%:

- a model twice as wide (--config.model.model_size=256, at 3e-3): all 1.886 at
  2e-3; rank 3, 49,152 parameters (1.49%), 2.071 at 5e-3, 10% above;
- fewer steps: after 300, 9% (2.123 and 1.944, on 30,000 held-out bytes, as all
  of the following);
- other layers with as many parameters: contract or expand alone, rank 6, 2.166;
  qkv and linear, rank 5, 2.185; qkv, rank 8, 2.228; linear, rank 16, 2.236;
- other scales: alpha 4 at 2e-2, 8 at 1e-2, 32 at 5e-3 and 64 at 3e-3, 2.120 to
  2.124;
- biases and norms as well (2.74%), 2.110; embeddings and positions (6.74%),
  2.069. Training all but these reaches 1.949: they are not what is missing.

Rank 8 (7.28%) comes within 4%, 2.019: the rank is, and 2% of the parameters buy
more of it in a wider model.

To a text that is nearer: the first run on the first 560,000 bytes of Tiny
Shakespeare (2,000 steps), then on the rest of it; before 2.004. All parameters,
1,000 steps: 1.734 at 1e-3, 1.725 at 2e-3. Lora: 1.786 at 5e-3, 1.789 at 1e-2,
and 1.786 after 2,000 steps at 5e-3: 3.0% above the one, 3.5% above the other.

One run each. Measured on 2026-11-26, two shared
cores of an AMD EPYC, JAX 0.10.2, Python 3.11.
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
