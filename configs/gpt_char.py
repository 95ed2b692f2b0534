"""GPT on a text, from nanoGPT's CPU budget up to GPT-2's 124 M parameters.

  python train.py --config=configs/gpt_char.py --workdir=runs/gpt_char
  python -m attention sample --workdir=runs/gpt_char --prompt="def "
  python train.py --config=configs/gpt_char.py:gpt2 --workdir=runs/gpt2 \\
    --config.data.path=TEXT [--config.data.level=tokenizer.json]

| size | layers × heads × width, context, batch, steps | parameters |
|---|---|---|
| (default) | 4 × 4 × 128, 64, 12, 2,000 | 0.81 M |
| base | 6 × 6 × 384, 256, 64, 5,000, dropout 0.2, bfloat16 | 10.8 M |
| gpt2 | 12 × 12 × 768, 1,024, 512 in 8 parts, 20,000, bfloat16 | 124.5 M |
| 7b | 32 × 32 × 4,096, 131,072, 16, 100,000, bfloat16 | 6.7 B |
| debug | 2 × 2 × 16, 16, 4, 30 | 8 k |

Default size, Tiny Shakespeare (sha256 86c4e6aa…, --config.data.path=input.txt):
1.762 nats per character on the last tenth of the text (1.833 at step 1,500), in
1 min 42 s at about 19,000 tokens/s. An earlier run reached 1.770;
implementation='reference', which rounds differently, 1.764. nanoGPT reports
1.88 for this size and budget. A peak learning rate of 3e-3 gave 1.767; 6e-3
decayed to 1% 1.771; 1e-2 decayed to 1% 1.767. These differences are within the
noise of one run.

Default size and text (Python 3.11's standard library): 1.640 nats per
character, 1 min 52 s.

Measured on 2026-11-21, two cores of an AMD EPYC, JAX 0.10.2.

With --config.data.level=bpe --config.training.steps=1000 on Tiny Shakespeare:
3.874 nats per token of 1,024, or 2.480 bits per byte; 1.762 nats per character
are 2.542 bits per byte. Measured on 2026-11-25, two cores, JAX 0.10.2.

`base` and `gpt2` are sized for one GPU. They store parameters in float32 and
compute in bfloat16; on CPU, --config.training.precision= restores float32.
`gpt2` learns a BPE of 50,257 tokens from the text, or reads a tokenizer.json
such as GPT-2's own, and pads the vocabulary to 50,304, a multiple of 128. A
step has 524,288 tokens, a run 10.5 billion; the text must fit into memory, and
the default text is far too short. Neither size has been run to its end.

`7b` has Llama 2's shape. It is there to plan long contexts on many devices; see
docs/guides/plans.md. It has not been run.

`gpt2` for 200 steps on an NVIDIA H200: 486,000 tokens/s, 42% of the peak, at
most 37.3 GiB, compiled in 31 s (JAX 0.11.2, 2026-11-26):
  python train.py --config=configs/gpt_char.py:gpt2 --workdir=runs/gpt2 \\
    --config.data.level=bytes --config.data.batch_size=128 \\
    --config.training.num_microbatches=2 --config.training.steps=200
"""

import ml_collections

_MIXED = 'params=float32,compute=bfloat16,output=float32'


def get_config(size: str = '') -> ml_collections.ConfigDict:
  """Returns the config of a size: '', 'debug', 'base', 'gpt2' or '7b'."""
  sizes = {
    '': _default,
    'debug': _debug,
    'base': _base,
    'gpt2': _gpt2,
    '7b': _7b,
  }
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
        'path': '',  # a UTF-8 text; '': the source of Python's standard library
        'level': 'characters',  # 'bytes', 'bpe' or a path: tokenizer.json
        'vocab_size': 1_024,  # of a BPE learned from the text
        'context_size': context_size,
        'batch_size': 12,
      },
      'model': {
        'vocab_size': 0,  # 0: the vocabulary of the data
        'context_size': context_size,
        'num_layers': 4,
        'num_heads': 4,
        'model_size': 128,
        'mixer': 'attention',  # or 'lstm', 'conv'
        'positions': 'learned',  # sinusoidal, rotary, alibi, t5, none
        'norm': 'pre',  # post, both
        'norm_kind': 'layer',  # rms, zero_centred_rms
        'norm_epsilon': 1e-5,
        'activation': 'gelu',  # relu, silu, geglu, swiglu
        'with_feed_forward_bias': True,
        'window': 0,  # reach of self-attention in tokens; 0: unlimited
        'window_pattern': 'w',  # of layers, repeated; wwf: 1 in 3 without
        'attention': {
          'similarity': 'scaled_dot',  # dot, cosine, general, additive
          'num_kv_heads': 0,  # a divisor of num_heads; 0: num_heads
          'key_size': 0,  # channels per head; 0: model_size / num_heads
          'scale': 0.0,  # of logits; 0: the similarity's
          'with_bias': True,  # of query, key and value
          'with_output_bias': True,
          'with_qk_norm': False,  # RMS norm of queries and keys
          'with_sinks': False,  # a learned extra logit per head
          'logit_cap': 0.0,  # c · tanh(logits / c); 0: none
          'rotary': {  # of positions='rotary'
            'base': 10_000.0,
            'num_channels': 0,  # the first ones of a head; 0: all
            'scaling': 'none',  # linear, llama3, yarn
            'factor': 1.0,  # of the scaling
            'original_length': 8_192,  # context before the scaling
          },
          'value_factorisation': 'low_rank',  # 'full'
          'implementation': '',  # fused, chunked, reference; '': the default
        },
        'dropout_rate': 0.0,
        'with_tied_output': True,
        'with_scaled_embeddings': False,  # times √model_size
        'output_logit_cap': 0.0,  # 0: none
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
        'steps_per_call': 50,
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
      'steps_per_call': 1,
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
      'steps_per_call': 1,
      'precision': _MIXED,
      'num_microbatches': 8,
    }
  )
  return config


def _7b():
  config = _gpt2()
  config.data.update(
    {'vocab_size': 32_000, 'context_size': 131_072, 'batch_size': 16}
  )
  config.model.update(
    {
      'vocab_size': 32_000,
      'num_layers': 32,
      'num_heads': 32,
      'model_size': 4_096,
      'hidden_size': 11_008,
      'positions': 'rotary',
      'norm_kind': 'rms',
      'activation': 'swiglu',
      'with_feed_forward_bias': False,
      'with_tied_output': False,
      'fused_qkv': False,  # a `tensor` axis would cut it across the three
      'use_scan': True,
      'use_remat': True,
    }
  )
  config.model.attention.update({'with_bias': False, 'with_output_bias': False})
  config.optimizer.update({'learning_rate': 3e-4, 'warmup_steps': 2_000})
  config.training.update({'steps': 100_000, 'num_microbatches': 1})
  return config
