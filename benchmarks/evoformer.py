"""Measure time and memory of an Evoformer block, forward and gradient.

  python benchmarks/evoformer.py [--num_seq=128] [--num_res=128] [--rounds=5]

The peer, `plain`, is the same block with implementation='reference' and
remat=False, which stores all logits and hidden layers, as AlphaFold's code does
in training. The two take turns. The table shows median times, and medians of
the per-round ratios, ours over the peer. Temporary memory is XLA's
`memory_analysis` of the compiled program. --no-peer omits the peer. --stack
instead shows the compile time and memory of the gradients of stacks of 2 and of
48 blocks. --devices=4 shows the memory of each of 4 devices, among which a mesh
divides the gradient: arguments, results and temporaries.
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from attention.modules.evoformer import EvoformerBlock, EvoformerStack

_WIDTHS = 256, 128  # AlphaFold's MSA and pair channels
_PEERS = {
  'ours': {},
  'plain': {'implementation': 'reference', 'remat': False},
}


def make(kind, arguments, **fields):
  """Create the forward and gradient functions, and their argument shapes."""
  model = hk.transform(lambda *x: kind(zero_init=False, **fields)(*x))
  num_seq, num_res = arguments.num_seq, arguments.num_res
  shapes = ((num_seq, num_res, _WIDTHS[0]), (num_res, num_res, _WIDTHS[1]))
  act = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
  masks = tuple(jax.ShapeDtypeStruct(s[:2], bool) for s in shapes)
  params = jax.eval_shape(model.init, jax.random.key(0), *act, *masks)

  def forward(params, act, masks, d_act):
    return model.apply(params, None, *act, *masks)

  def gradient(params, act, masks, d_act):
    _, vjp = jax.vjp(lambda *x: forward(*x, masks, None), params, act)
    return vjp(d_act)

  programs = {'forward': forward, 'gradient': gradient}
  return programs, (params, act, masks, act)


def fill(shapes):
  """Draw arrays for shapes: random masks, and normal values otherwise."""
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten(
    jax.random.bernoulli(k, 0.9, x.shape)
    if x.dtype == bool
    else 0.1 * jax.random.normal(k, x.shape)
    for k, x in zip(keys, leaves, strict=True)
  )


def mebibytes(compiled):
  return compiled.memory_analysis().temp_size_in_bytes / 2**20


def compare_blocks(arguments):
  compiled, memory = {}, {}
  for peer, fields in _PEERS.items():
    if peer == 'plain' and not arguments.peer:
      continue
    programs, shapes = make(EvoformerBlock, arguments, **fields)
    for name, program in programs.items():
      compiled[name, peer] = jax.jit(program).lower(*shapes).compile()
      memory[name, peer] = mebibytes(compiled[name, peer])
  inputs = fill(shapes)
  times = {key: [] for key in compiled}
  for n in range(arguments.rounds + 1):  # the first round is a warm-up
    for key, run in compiled.items():
      start = time.perf_counter()
      jax.block_until_ready(run(*inputs))
      if n:
        times[key].append(time.perf_counter() - start)
  table = Table('', 'peer', 's', 'ours / peer', 'temporary MiB')
  for (name, peer), seconds in sorted(times.items()):
    ours = times[name, 'ours']
    ratios = [a / b for a, b in zip(ours, seconds, strict=True)]
    table.add_row(
      name,
      peer,
      f'{statistics.median(seconds):.2f}',
      f'{statistics.median(ratios):.2f}',
      f'{memory[name, peer]:.0f}',
    )
  return table


def compare_stacks(arguments):
  table = Table('blocks', 'compile s', 'temporary MiB')
  for num_blocks in (2, 48):
    programs, shapes = make(EvoformerStack, arguments, num_blocks=num_blocks)
    lowered = jax.jit(programs['gradient']).lower(*shapes)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    table.add_row(
      str(num_blocks), f'{seconds:.1f}', f'{mebibytes(compiled):.0f}'
    )
  return table


def compare_devices(arguments):
  jax.config.update('jax_num_cpu_devices', arguments.devices)
  table = Table('devices', 'blocks', 'MiB of each', 'ratio')
  for kind in ({}, {'num_blocks': 3}):
    programs, (params, *shapes) = make(
      EvoformerStack if kind else EvoformerBlock, arguments, **kind
    )
    first = None
    for count in (1, arguments.devices):
      mesh = jax.make_mesh(
        (count,),
        ('pairs',),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:count],
      )
      whole, rows = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('pairs',))
      )
      with jax.set_mesh(mesh):
        memory = (
          jax.jit(
            programs['gradient'],
            in_shardings=(whole, rows, rows, rows),
            out_shardings=(whole, rows),
          )
          .lower(params, *shapes)
          .compile()
          .memory_analysis()
        )
      size = (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
      )
      first = first or size
      table.add_row(
        str(count),
        str(kind.get('num_blocks', 1)),
        f'{size / 2**20:.0f}',
        f'{size / first:.2f}',
      )
  return table


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--num_seq', type=int, default=128)
  parser.add_argument('--num_res', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--stack', action='store_true')
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument(
    '--peer', action=argparse.BooleanOptionalAction, default=True
  )
  arguments = parser.parse_args()
  compare = compare_stacks if arguments.stack else compare_blocks
  if arguments.devices > 1:
    compare = compare_devices
  table = compare(arguments)
  table.title = f'{arguments.num_seq} sequences × {arguments.num_res} residues'
  table.caption = f'jax {jax.__version__}, {jax.default_backend()}'
  Console().print(table)


if __name__ == '__main__':
  main()
