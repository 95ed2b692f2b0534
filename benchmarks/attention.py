"""Compare the time and memory of attention with alternatives on this machine.

  python benchmarks/attention.py [WORKLOAD ...] [--rounds=9]

The peers take turns in each round. An untimed run precedes each timed one, so
that no peer is affected by the state of caches and memory left by the previous
one. The table shows median times, and medians of the per-round ratios, peer
over ours.

`einsum` is AlphaFold's attention: products, bias, where(mask, ·, -1e9),
softmax, products. PyTorch's is scaled_dot_product_attention (flash) on
[b, h, q, d], if torch is installed. Temporary memory is XLA's `memory_analysis`
of the compiled program. With --rounds=0 nothing runs, and only the memory is
shown.
"""

# ruff: noqa: E402
import sys

# This script has the library's name, so `import attention` would find it first.
del sys.path[0]

import argparse
import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import attention
from attention import Mask

try:
  import torch
except ImportError:
  torch = None

# name: (query shape, key length or None for the same, mask kind, bias shape)

WORKS = {
  'pair256': ((256, 256, 4, 32), None, 'keys', (4, 256, 256)),
  'pair512': ((512, 512, 4, 32), None, 'keys', (4, 512, 512)),
  'causal64': ((32, 64, 4, 32), None, 'causal', None),
  'causal256': ((8, 256, 4, 64), None, 'causal', None),
  'causal1024': ((1, 1024, 4, 64), None, 'causal', None),
  'causal4096': ((1, 4096, 4, 64), None, 'causal', None),
  'causal8192': ((1, 8192, 4, 64), None, 'causal', None),
  'template': ((16384, 1, 4, 16), 4, None, None),
}
_WINDOW = 1024  # 'window' compares ours with itself at two lengths
_LENGTHS = (8192, 32768)
_REST = 0.05  # seconds after each turn: PyTorch's threads keep spinning briefly
_ALL = [*WORKS, 'window']
_DEFAULT = [w for w in _ALL if w not in ('pair512', 'causal8192')]


def einsum(query, key, value, bias, mask):
  """AlphaFold's attention, on [b, q, h, c] arrays."""
  logits = jnp.einsum('bqhc,bkhc->bhqk', query * query.shape[-1] ** -0.5, key)
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, -1e9)
  return jnp.einsum('bhqk,bkhc->bqhc', jax.nn.softmax(logits), value)


def library(implementation):
  """Make a function that calls our attention with a structured mask."""

  def call(query, key, value, bias, mask):
    return attention.dot_product_attention(
      query, key, value, bias=bias, mask=mask, implementation=implementation
    )

  return call


def masks(kind, shape, num_key):
  """Return the mask as a `Mask` and as an array."""
  if kind is None:
    return None, None
  if kind == 'keys':
    lengths = np.random.default_rng(0).integers(num_key // 2, num_key, shape[0])
    mask = Mask.lengths(key_lengths=lengths)
  else:
    mask = Mask.causal()
  return mask, mask.to_array(shape[1], num_key)


def torch_peer(arrays, mask, is_gradient):
  """Make a function without arguments that computes the same in PyTorch."""
  query, key, value, bias, cotangent = (
    None if x is None else torch.from_numpy(np.array(x)) for x in arrays
  )
  query, key, value, cotangent = (
    x.transpose(1, 2).contiguous() for x in (query, key, value, cotangent)
  )
  is_causal = bias is None and mask is not None
  if bias is not None:
    allowed = torch.from_numpy(np.array(mask))
  leaves = [x for x in (query, key, value, bias) if x is not None]
  for leaf in leaves:
    leaf.requires_grad_(is_gradient)

  def run():
    extra = None
    if bias is not None:
      extra = bias + torch.where(allowed, 0.0, -1e9)
    output = torch.nn.functional.scaled_dot_product_attention(
      query, key, value, attn_mask=extra, is_causal=is_causal
    )
    if is_gradient:
      torch.autograd.grad(output, leaves, cotangent)

  return run


def jax_peer(function, arrays, mask, is_gradient):
  """Compile a JAX peer; returns a function and its temporary bytes."""
  *inputs, cotangent = arrays

  def gradient(mask, cotangent, *inputs):
    _, vjp = jax.vjp(lambda *x: function(*x, mask), *inputs)
    return vjp(cotangent)

  def forward(mask, _, *inputs):
    return function(*inputs, mask)

  chosen = jax.jit(gradient if is_gradient else forward)
  compiled = chosen.lower(mask, cotangent, *inputs).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  return lambda: jax.block_until_ready(
    compiled(mask, cotangent, *inputs)
  ), memory


def measure(peers, rounds):
  """Time the peers in turn; returns a list of seconds for each peer."""
  times = {name: [] for name in peers}
  order, rng = list(peers.items()), random.Random(0)
  for _ in range(rounds):
    rng.shuffle(order)
    for name, run in order:
      run()
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
      time.sleep(_REST)
  return times


def draw(shape, num_key, bias_shape):
  """Draw query, key, value, bias or None, and the output's cotangent."""
  keys = jax.random.split(jax.random.key(0), 5)
  kv_shape = (shape[0], num_key, *shape[2:])
  shapes = (shape, kv_shape, kv_shape, bias_shape, shape)
  return [
    None if s is None else jax.random.normal(k, s)
    for k, s in zip(keys, shapes, strict=True)
  ]


def compare(name, is_gradient, rounds, table):
  """Add a row for each peer to the table."""
  shape, num_key, kind, bias_shape = WORKS[name]
  num_key = num_key or shape[1]
  arrays = draw(shape, num_key, bias_shape)
  mask, array = masks(kind, shape, num_key)
  functions = {
    'default': library(None),
    'chunked': library('chunked'),
    'reference': library('reference'),
    'einsum': einsum,
  }
  peers, memory = {}, {}
  for peer, function in functions.items():
    peers[peer], memory[peer] = jax_peer(
      function, arrays, array if peer == 'einsum' else mask, is_gradient
    )
  if torch and rounds:
    peers['PyTorch'] = torch_peer(arrays, array, is_gradient)
  times = measure(peers, rounds)
  add_rows(table, name, is_gradient, times, memory, 'default')


def compare_lengths(is_gradient, rounds, table):
  """Add rows for one window at two lengths; the longer time is per length."""
  mask = Mask.causal() & Mask.window(left=_WINDOW - 1)
  short, long = _LENGTHS
  more = long // short
  names = {short: f'{short}', long: f'{long}, time / {more}'}
  peers, memory = {}, {}
  for length, name in names.items():
    arrays = draw((1, length, 4, 64), length, None)
    peers[name], memory[name] = jax_peer(
      library(None), arrays, mask, is_gradient
    )
  times = measure(peers, rounds)
  times[names[long]] = [x / more for x in times[names[long]]]
  add_rows(table, f'window{_WINDOW}', is_gradient, times, memory, names[short])


def add_rows(table, work, is_gradient, times, memory, base):
  """Add a row per peer: median times, and medians of the ratios to `base`."""
  for peer, seconds in times.items():
    ratios = [a / b for a, b in zip(seconds, times[base], strict=True)]
    table.add_row(
      work,
      'gradient' if is_gradient else 'forward',
      peer,
      f'{statistics.median(seconds) * 1e3:.1f}' if seconds else '',
      f'{statistics.median(ratios):.2f}' if ratios else '',
      f'{memory[peer] / 2**20:.1f}' if peer in memory else '',
      f'{memory[peer] / memory[base]:.1f}' if peer in memory else '',
    )
  table.add_section()


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'works', nargs='*', metavar='WORKLOAD', help=', '.join(_ALL)
  )
  parser.add_argument('--rounds', type=int, default=9)
  arguments = parser.parse_args()
  works = arguments.works or _DEFAULT
  unknown = sorted({*works} - {*_ALL})
  if unknown:
    parser.error(f'no such workload: {", ".join(unknown)}')
  table = Table(
    'workload', 'pass', 'peer', 'ms', 'ms\nratio', 'MiB', 'MiB\nratio'
  )
  for work in works:
    for is_gradient in (False, True):
      if work == 'window':
        compare_lengths(is_gradient, arguments.rounds, table)
      else:
        compare(work, is_gradient, arguments.rounds, table)
  versions = f'jax {jax.__version__}'
  versions += f', torch {torch.__version__}' if torch else ''
  table.caption = (
    f'ratios are to the first peer; MiB is temporary memory\n{versions}'
  )
  Console().print(table)


if __name__ == '__main__':
  main()
