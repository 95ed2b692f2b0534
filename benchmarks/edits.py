"""What `attention.edit` and a sweep of edits cost, against plain calls.

  python benchmarks/edits.py
  python benchmarks/edits.py --small

A GPT of GPT-2's shape (124 million parameters), one sequence of 64 tokens, in
float32. Compared are a call without edits and a plain call, and a sweep that
ablates each of 12 × 12 heads in turn and as many plain calls, one after the
other. The two of a pair take turns; medians over turns. Memory is that of the
compiled program's temporary arrays.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import statistics
import time

import haiku as hk
import jax
import jax.numpy as jnp

import attention
from attention import analysis, models

SIZES = {
  'gpt2': dict(num_layers=12, num_heads=12, model_size=768, vocab_size=50257),
  'small': dict(num_layers=3, num_heads=4, model_size=64, vocab_size=101),
}
LENGTH = 64


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--small', action='store_true', help='a tiny model')
  parser.add_argument('--turns', type=int, default=5)
  arguments = parser.parse_args()
  size = SIZES['small' if arguments.small else 'gpt2']
  num_runs = size['num_layers'] * size['num_heads']

  def function(tokens):
    return models.create('gpt', context_size=LENGTH, **size)(tokens)

  model = hk.transform(function)
  tokens = jnp.arange(LENGTH)[None] % size['vocab_size']
  params = jax.jit(model.init)(jax.random.key(0), tokens)

  def metric(logits):
    return logits[0, -1, 0]

  def plain(params, tokens):
    return metric(model.apply(params, None, tokens))

  def unedited(params, tokens):
    return metric(attention.edit(function, params, {}, tokens))

  def sweep(params, tokens):
    change = attention.Edit('weighted_value')
    return analysis.sweep(function, params, change, tokens, metric=metric)

  compiled, seconds = {}, {}
  for name, call in (
    ('plain', plain),
    ('no edits', unedited),
    ('sweep', sweep),
  ):
    start = time.perf_counter()
    compiled[name] = jax.jit(call).lower(params, tokens).compile()
    seconds[name] = time.perf_counter() - start
    compiled[name](params, tokens)

  def measure(name, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(compiled[name](params, tokens))
    return time.perf_counter() - start

  def compare(name, repeats, plain_repeats):
    pairs = [
      (measure('plain', plain_repeats), measure(name, repeats))
      for _ in range(arguments.turns)
    ]
    plains, others = zip(*pairs, strict=True)
    ratio = statistics.median(o / p for p, o in pairs)
    print(
      f'{name}: {statistics.median(others):.3f} s, {plain_repeats} plain calls '
      f'{statistics.median(plains):.3f} s, ratio {ratio:.3f}'
    )

  compare('no edits', 20, 20)
  compare('sweep', 1, num_runs)
  for name, program in compiled.items():
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    print(f'{name}: compiled in {seconds[name]:.1f} s, {memory:.1f} MiB')


if __name__ == '__main__':
  main()
