"""Compare greedy decoding with a GPT to transformers, on the CPU.

  python benchmarks/decode.py [--rounds=7] [--batch_sizes=1,16] [--recompute]

A GPT of 10.7 M parameters (6 layers, 6 heads, width 384, vocabulary of 65)
generates 256 tokens after a prompt of 64. The peers are transformers'
`generate` with its cache, on the same weights, and our own model without a
cache (--recompute). The peers' tokens are compared with ours. All take turns in
one process. The table shows medians over the rounds, and medians of the
per-round ratios.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import functools
import statistics
import tempfile
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from attention import decoding, models
from attention.interop import transformers as interop
from attention.models.gpt import window_step
from attention.ops.cache import Cache

PROMPT, NEW, CONTEXT = 64, 256, 320
SIZES = dict(num_layers=6, num_heads=6, model_size=384)
VOCAB = 65


def our_model():
  model = hk.without_apply_rng(
    hk.transform(
      lambda tokens, **more: models.create(
        'gpt', vocab_size=VOCAB, context_size=CONTEXT, **SIZES
      )(tokens, **more)
    )
  )
  params = model.init(jax.random.key(0), np.zeros((1, 2), int))
  # Scaled up, so that the most likely token is unambiguous.
  return model, jax.tree.map(lambda p: p * 3, params)


def ours(model, params, prompt):
  """Compile greedy decoding with a cache; returns (program, inputs)."""

  @jax.jit
  def decode(params, prompt):
    def step(tokens, cache):
      logits, cache = model.apply(params, tokens, cache=cache)
      return logits[:, -1], cache

    return decoding.greedy(step, Cache.create(CONTEXT), prompt, NEW)

  return decode.lower(params, prompt).compile(), (params, prompt)


def recomputing(model, params, prompt):
  """Compile decoding without a cache, which reruns the whole sequence."""

  @jax.jit
  def decode(params, prompt):
    step, (window, length) = window_step(model.apply, params, CONTEXT)
    window = jnp.repeat(window, len(prompt), axis=0)
    return decoding.greedy(step, (window, length), prompt, NEW)

  return decode.lower(params, prompt).compile(), (params, prompt)


def peer(params):
  """Create transformers' GPT-2 with our parameters."""
  fields = dict(vocab_size=VOCAB, context_size=CONTEXT, **SIZES)
  with tempfile.TemporaryDirectory() as folder:
    interop.save(folder, fields, params)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def generate(network, prompt):
  prompt = torch.from_numpy(np.array(prompt, np.int64))
  with torch.inference_mode():
    tokens = network.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=NEW,
      do_sample=False,
      use_cache=True,
      pad_token_id=0,
    )
  return tokens[:, PROMPT:].numpy()


def describe_memory(compiled, batch_size, itemsize):
  """Format the size of the cache, and of all temporaries."""
  size = SIZES['model_size']
  cache = 2 * SIZES['num_layers'] * batch_size * CONTEXT * size * itemsize
  memory = compiled.memory_analysis()
  return (
    f'batch {batch_size}: cache {cache / 2**20:.1f} MiB (from its shapes), all '
    f'temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batch_sizes', default='1,16')
  parser.add_argument(
    '--recompute', action='store_true', help='include decoding without a cache'
  )
  parser.add_argument('--dtypes', default='float32,bfloat16')
  arguments = parser.parse_args()
  model, params = our_model()
  count = sum(p.size for p in jax.tree.leaves(params))
  network = peer(params)
  console = Console()
  table = Table('batch', '', 'tokens/s', 'time ratio to first', 'tokens')
  for batch_size in map(int, arguments.batch_sizes.split(',')):
    prompt = np.random.default_rng(0).integers(0, VOCAB, (batch_size, PROMPT))
    contestants = {}
    for dtype in arguments.dtypes.split(','):
      weights = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), params)
      compiled, inputs = ours(model, weights, prompt)
      contestants[f'attention, {dtype}'] = functools.partial(compiled, *inputs)
      itemsize = jnp.dtype(dtype).itemsize
      console.print(dtype, describe_memory(compiled, batch_size, itemsize))
    contestants['transformers, generate'] = functools.partial(
      generate, network, prompt
    )
    if arguments.recompute:
      compiled, inputs = recomputing(model, params, prompt)
      contestants['recomputing'] = functools.partial(compiled, *inputs)
    times, tokens = {name: [] for name in contestants}, {}
    for n in range(arguments.rounds + 1):  # the first round is a warm-up
      for name, decode in contestants.items():
        start = time.perf_counter()
        tokens[name] = np.asarray(decode())
        seconds = time.perf_counter() - start
        if n:
          times[name].append(seconds)
    first = next(iter(times))
    for name, seconds in times.items():
      ratios = [a / b for a, b in zip(seconds, times[first], strict=True)]
      same = (tokens[name] == tokens[first]).mean()
      table.add_row(
        str(batch_size),
        name,
        f'{batch_size * NEW / statistics.median(seconds):,.0f}',
        f'{statistics.median(ratios):.2f}',
        f'{same:.1%} identical',
      )
  versions = f'jax {jax.__version__}, torch {torch.__version__}'
  versions += f', transformers {transformers.__version__}'
  table.caption = (
    f'{count / 1e6:.1f} M parameters; {versions}, {torch.get_num_threads()} '
    'threads'
  )
  console.print(table)


if __name__ == '__main__':
  main()
