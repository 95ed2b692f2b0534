"""Attention in programs over several devices.

Batch axes and heads need no communication, so each device computes its own
shard. Only gradients of operands that several rows share, such as a pair bias,
are summed over devices.

XLA can't partition a kernel: it would gather its operands on every device. With
the mesh of a run in context (see `meshes`), the program itself divides the
work, over batches, heads, and the positions of self-attention. Without one,
`run` tells XLA's partitioner how to, for batches and heads. The TPU compiler
has no hook for that: see `platforms.PARTITIONED_TPUS`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from attention.ops import meshes
from attention.ops.biases import Relative
from attention.ops.meshes import BATCH, CONTEXT, TENSOR

_leaves = jax.tree.leaves


def run(function, gradients: bool, *arguments):
  """Compute function(*arguments), partitioned where XLA partitions the program.

  Args:
    function: takes (query, key, value, options, *others) and closes over no
      arrays; its results are laid out like its arguments.
    gradients: whether it returns the gradients of query, key, value and
      options, instead of [*b, q, h, e] and two arrays [*b, q, h].
    *arguments: the function's arguments; the others are [*b, q, h, …].
  """
  leaves, tree = jax.tree.flatten(arguments)
  names = _names(arguments, gradients, with_positions=False)

  @jax.jit  # holds constants, which `custom_partitioning` does not accept
  def flat(*leaves):
    return _leaves(function(*jax.tree.unflatten(tree, leaves)))

  shapes = jax.eval_shape(function, *arguments)

  def partition(mesh, infos, _):
    axes_of = _partitioned_axes(mesh, infos, *names[0][:2])
    results, inputs = (
      [NamedSharding(mesh, spec) for spec in _specs(n, axes_of)]
      for n in names[::-1]
    )
    compute = _on_shards(function, tree, names[1], axes_of)
    return mesh, compute, results, tuple(inputs)

  whole = custom_partitioning(flat)
  query, key = arguments[:2]
  rule, special = _rule(names, query.shape[-2], key.shape[-2])
  whole.def_partition(partition, sharding_rule=rule, **special)
  mapped = jax.custom_batching.custom_vmap(whole)

  @mapped.def_vmap
  def _(size, is_mapped, *leaves):
    dims = [0 if m else None for m in is_mapped]
    results = jax.vmap(flat, dims, axis_size=size)(*leaves)
    return results, [True] * len(results)

  return jax.tree.unflatten(jax.tree.structure(shapes), mapped(*leaves))


def run_over_mesh(function, axes_of: dict, gradients: bool, *arguments):
  """Compute function(*arguments) on the shards of the mesh in context.

  Args:
    function: as in `run`.
    axes_of: from `axes_in_context`.
    gradients: as in `run`.
    *arguments: as in `run`.
  """
  leaves, tree = jax.tree.flatten(arguments)
  names = _names(arguments, gradients)
  found = []

  def structured(*arguments):
    results = function(*arguments)
    found.append(jax.tree.structure(results))
    return results

  inputs, results = (_specs(n, axes_of) for n in names)
  compute = _on_shards(structured, tree, names[1], axes_of)
  results = meshes.per_device(compute, tuple(inputs), results)(*leaves)
  return jax.tree.unflatten(found[0], results)


def axes_in_context(query, key, value, options) -> dict | None:
  """Return which axes of a run's mesh divide which axes of the arguments.

  Returns:
    {'b0': mesh axes of the batch, 't': of positions in self-attention, 'h': of
    heads, 'g': of key heads}, without those that are not divided. None without
    the mesh of a run over several devices.
  """
  mesh = meshes.in_context()
  if mesh is None or not {*BATCH, TENSOR, CONTEXT} <= mesh.shape.keys():
    return None
  if mesh.size == 1:
    return None
  names = _names((query, key, value, options), False)[0]
  of_query, of_key = names[:2]
  wanted = {'b0': BATCH, 't': (CONTEXT,), 'h': (TENSOR,), 'g': (TENSOR,)}
  sizes = dict(zip(of_key, key.shape, strict=True))
  sizes |= dict(zip(of_query, query.shape, strict=True))
  if meshes.in_batch():
    del wanted['b0']

  def is_divided(name):
    count = math.prod(mesh.shape[a] for a in wanted[name])
    return count > 1 and name in sizes and sizes[name] % count == 0

  found = {name: axes for name, axes in wanted.items() if is_divided(name)}
  if (
    'g' in of_key and 'g' not in found
  ):  # query heads stay with their key heads
    found.pop('h', None)
  return found


def _on_shards(function, tree, names, axes_of):
  """Make a function of one device's leaves that returns its results' leaves."""

  def compute(*leaves):
    arguments = list(jax.tree.unflatten(tree, leaves))
    arguments[3] = _dropout_per_device(arguments[3], axes_of)
    results = _leaves(function(*arguments))
    return [
      _sum_over_devices(x, n, axes_of)
      for x, n in zip(results, names, strict=True)
    ]

  return compute


def _specs(names, axes_of):
  return [PartitionSpec(*map(axes_of.get, each)) for each in names]


def _names(arguments, gradients, with_positions=True):
  """Name the axes of (arguments, results); None is not partitioned.

  Batch axes are 'b0', 'b1', …, positions 't' in self-attention, heads 'h' and
  key heads 'g'. A single key head is not partitioned.
  """
  query, key, _, options, *others = arguments
  batch = [f'b{i}' for i in range(query.ndim - 3)]
  sizes = dict(zip((*batch, 't', 'h'), query.shape, strict=False))
  is_whole = query.shape[-3] != key.shape[-3] or options.vector is not None
  if is_whole or not with_positions:
    del sizes['t']
  positions = 't' if sizes.get('t', 1) > 1 else None

  def of(x, *last):
    """Name the axes of an array that broadcasts to the batch and `last`."""
    shape = jnp.shape(x)
    named = (*batch, *last)[len(batch) + len(last) - len(shape) :]
    return tuple(
      n if sizes.get(n) == size > 1 else None
      for n, size in zip(named, shape, strict=True)
    )

  def of_bias(x):
    if not isinstance(options.bias, Relative):
      return of(x, 'h', 't', None)
    return (None,) * (x.ndim - 1) + of(x[(0,) * (x.ndim - 1)], 'h')

  group = 'g' if key.shape[-2] > 1 else None
  heads, groups = ((*batch, positions, n, None) for n in ('h', group))
  after = {0: (), 1: ('t',), 3: ('h', 't', None)}
  conditions = () if options.mask is None else options.mask.conditions
  masks = [of(x, *after[c.trailing]) for c in conditions for x in _leaves(c)]
  bias = [of_bias(x) for x in _leaves(options.bias)]
  sinks = [of(x, 'h') for x in _leaves(options.sinks)]
  dropout = [(None,) * jnp.ndim(x) for x in _leaves(options.dropout)]
  vector = [(*of(x[:, 0], 'h'), None) for x in _leaves(options.vector)]
  inputs = [heads, groups, groups, *bias, *masks, *sinks, *dropout, *vector]
  inputs += [heads[: x.ndim] for x in others]
  if gradients:
    return inputs, [heads, groups, groups, *bias, *sinks, *vector]
  return inputs, [heads, heads[:-1], heads[:-1]]


def _rule(names, num_heads, num_groups):
  """Convert the names to a Shardy sharding rule and its special factors."""
  shared = num_heads // num_groups
  words, special = {}, {}
  if shared == 1:
    words['h'] = 'g' if num_groups > 1 else 'h'
  elif num_groups > 1:
    words['h'], special['s'] = '(g s)', shared
  lone = []

  def word(name):
    if name is None:
      lone.append(f'x{len(lone)}')
      return lone[-1]
    return words.get(name, name)

  inputs, results = (
    ', '.join(' '.join(map(word, n)) for n in each) for each in names
  )
  special['need_replication_factors'] = tuple(lone)
  return f'{inputs} -> {results}', special


def _partitioned_axes(mesh, infos, query_names, key_names):
  """Return the mesh axes that partition query and key, by axis name."""
  axes_of = {}
  for info, names in zip(infos, (query_names, key_names), strict=False):
    spec = getattr(info.sharding, 'spec', ())
    for name, axes, size in zip(names, spec, info.shape, strict=False):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      count = math.prod(mesh.shape[a] for a in axes)
      if name and axes and size % count == 0:
        axes_of[name] = axes
  if 'g' in key_names:  # query heads stay with their key heads
    axes_of['h'] = axes_of['g'] = axes_of.get('g', ())
  return {name: axes for name, axes in axes_of.items() if axes}


def _sum_over_devices(x, names, axes_of):
  """Sum `x` over the devices that each hold a partial sum of it."""
  if not names:
    return x
  kept = {'h' if n == 'g' else n for n in names}
  axes = [
    axis
    for name, axes in axes_of.items()
    if name != 'g' and name not in kept
    for axis in axes
  ]
  if not axes:
    return x
  return jax.lax.psum(x.astype(jnp.float32), tuple(axes)).astype(x.dtype)


def _dropout_per_device(options, axes_of):
  """Return the options with a different dropout seed on each device."""
  # A ring's dropout depends on global positions.
  axes = tuple(
    a for n, axes in axes_of.items() if n not in ('g', 't') for a in axes
  )
  if options.dropout is None or not axes:
    return options
  number = jax.lax.axis_index(axes).astype(jnp.uint32)
  seed = options.dropout.seed + number * jnp.uint32(0x9E3779B9)
  return dataclasses.replace(
    options, dropout=dataclasses.replace(options.dropout, seed=seed)
  )
