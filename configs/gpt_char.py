"""GPTs on a text: characters at nanoGPT's CPU budget, up to GPT-2's 124 M.

  python train.py --config=configs/gpt_char.py --workdir=runs/gpt_char
  python -m attention sample --workdir=runs/gpt_char --prompt="def "
  python train.py --config=configs/gpt_char.py:gpt2 --workdir=runs/gpt2 \\
    --config.data.path=TEXT [--config.data.level=tokenizer.json]

| size | layers × heads × width, context, batch, steps | parameters |
|---|---|---|
| (default) | 4 × 4 × 128, 64, 12, 2,000 | 0.81 M |
| base | 6 × 6 × 384, 256, 64, 5,000, dropout 0.2, bfloat16 | 10.8 M |
| gpt2 | 12 × 12 × 768, 1,024, 512 in 8 parts, 20,000, bfloat16 | 124.5 M |
| debug | 2 × 2 × 16, 16, 4, 30 | 8 k |

Default size, Tiny Shakespeare (sha256 86c4e6aa…, --config.data.path=input.txt):
1.762 nats per character on the whole last tenth (1.833 at step 1,500), in 1 min
42 s at about 19,000 tokens/s; 1.770 in an earlier run, 1.764 with
implementation='reference', whose sums round differently. nanoGPT quotes 1.88
for this size and budget. A peak learning rate of 3e-3 gave 1.767, 6e-3 with a
decay to 1% 1.771, 1e-2 likewise 1.767: all within the noise of one run.

Default size and text (Python 3.11's standard library): 1.640 nats per
character, 1 min 52 s.

Measured on 2026-11-21, two cores of an AMD EPYC, JAX 0.10.2.

With --config.data.level=bpe --config.training.steps=1000 on Tiny Shakespeare:
3.874 nats per token of 1,024, which are 2.480 bits per byte; 1.762 nats per
character are 2.542. Measured on 2026-11-25, two cores, JAX 0.10.2.

`base` and `gpt2` are for one GPU and have not been run. They store parameters
in float32 and compute in bfloat16; on CPU, --config.training.precision= turns
that off. `gpt2` learns a BPE of 50,257 tokens from the text, or reads a given
tokenizer.json such as GPT-2's own, and pads the vocabulary to 50,304, a
multiple of 128. A step is 524,288 tokens, a run 10.5 billion: its text has to
fit into memory, and the default one is far too short for it. Compiled for an
H100, not run (2026-11-25, JAX 0.10.2): a step holds at most 31.2 GiB, 16.7 with
--config.training.num_microbatches=16, 47.8 in float32; an evaluation 25.5; a
step of `base` 1.7.
"""

import ml_collections

_MIXED = 'params=float32,compute=bfloat16,output=float32'


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """The config of that size: '', 'debug', 'base' or 'gpt2'."""
  sizes = {'': _default, 'debug': _debug, 'base': _base, 'gpt2': _gpt2}
  if size not in sizes:
    raise ValueError(f'size: expected one of {sorted(sizes)}, got {size!r}')
  return sizes[size]()


def _default():
  context_size = ml_collections.FieldReference(64)
  return ml_collections.ConfigDict(
    {
      'task': 'language',
      'seed': 0,
      'data': {
        'path': '',  # a UTF-8 text; '': the Python standard library's source
        'level': 'characters',  # 'bytes', 'bpe' or a path: tokenizer.json
        'vocab_size': 1_024,  # of 'bpe', which is learnt from the text
        'context_size': context_size,
        'batch_size': 12,
      },
      'model': {
        'vocab_size': 0,  # 0: as many as the data has
        'context_size': context_size,
        'num_layers': 4,
        'num_heads': 4,
        'model_size': 128,
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
        'dropout_rate': 0.0,
        'with_tied_output': True,
        'use_scan': False,  # compile one block for all layers
        'use_remat': False,  # recompute blocks: less memory, more time
      },
      'optimizer': {
        'learning_rate': 6e-3,
        'warmup_steps': 100,
        'final_fraction': 0.1,
        'weight_decay': 0.1,
        'b1': 0.9,
        'b2': 0.99,
        'clip_norm': 1.0,
      },
      # Further keys and their defaults: attention/training/training_config.py.
      'training': {
        'steps': 2_000,
        'log_every': 100,
        'eval_every': 500,
        'checkpoint_every': 500,
      },
    }
  )


def _debug():
  config = _default()
  config.data.update({'context_size': 16, 'batch_size': 4})
  config.model.update({'num_layers': 2, 'num_heads': 2, 'model_size': 16})
  config.optimizer.update({'warmup_steps': 5})
  config.training.update(
    {
      'steps': 30,
      'log_every': 5,
      'eval_every': 15,
      'checkpoint_every': 10,
    }
  )
  return config


def _base():
  config = _default()
  config.data.update({'context_size': 256, 'batch_size': 64})
  config.model.update(
    {
      'num_layers': 6,
      'num_heads': 6,
      'model_size': 384,
      'dropout_rate': 0.2,
    }
  )
  config.optimizer.update({'learning_rate': 1e-3})
  config.training.update(
    {
      'steps': 5_000,
      'eval_every': 250,
      'checkpoint_every': 250,
      'precision': _MIXED,
    }
  )
  return config


def _gpt2():
  config = _default()
  config.data.update(
    {
      'level': 'bpe',
      'vocab_size': 50_257,
      'context_size': 1_024,
      'batch_size': 512,  # about half a million tokens
    }
  )
  config.model.update(
    {
      'vocab_size': 50_304,
      'num_layers': 12,
      'num_heads': 12,
      'model_size': 768,
    }
  )
  config.optimizer.update(
    {'learning_rate': 6e-4, 'warmup_steps': 700, 'b2': 0.95}
  )
  config.training.update(
    {
      'steps': 20_000,
      'log_every': 10,
      'precision': _MIXED,
      'num_microbatches': 8,
    }
  )
  return config
