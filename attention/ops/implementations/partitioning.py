"""Partitioning of attention where XLA partitions a program over devices.

XLA can't partition a kernel: it would gather its operands on every device.
Batch axes and heads need no communication, so each device computes its own
shard. Only gradients of operands that several rows share, such as a pair bias,
are summed over devices. If the mesh axis `CONTEXT` cuts the positions of
queries and keys of self-attention, keys and values travel around a ring (see
`ring`). The TPU compiler has no hook for this: see
`platforms.PARTITIONED_TPUS`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from attention.ops.biases import Relative
from attention.ops.meshes import BATCH, CONTEXT, TENSOR

_leaves = jax.tree.leaves


def run(function, over_positions, gradients: bool, *arguments):
  """Compute function(*arguments), with each device computing its shard.

  Args:
    function: takes (query, key, value, options, *others) and closes over no
      arrays; its results are laid out like its arguments.
    over_positions: a function of mesh axes that returns what replaces
      `function` where these axes cut the positions.
    gradients: whether it returns the gradients of query, key, value and
      options, instead of [*b, q, h, e] and two arrays [*b, q, h].
    *arguments: the function's arguments; the others are [*b, q, h, …].
  """
  leaves, tree = jax.tree.flatten(arguments)

  @jax.jit  # holds constants, which `custom_partitioning` does not accept
  def flat(*leaves):
    return _leaves(function(*jax.tree.unflatten(tree, leaves)))

  shapes = jax.eval_shape(function, *arguments)
  names = _names(arguments, gradients)

  def partition(mesh, infos, _):
    axes_of = _partitioned_axes(mesh, infos, *names[0][:2])

    def compute_shard(*leaves):
      arguments = list(jax.tree.unflatten(tree, leaves))
      arguments[3] = _dropout_per_device(arguments[3], axes_of)
      compute = function
      if 't' in axes_of:
        compute = over_positions(axes_of['t'])
      results = _leaves(compute(*arguments))
      return [
        _sum_over_devices(x, n, axes_of)
        for x, n in zip(results, names[1], strict=True)
      ]

    results, inputs = (
      [NamedSharding(mesh, PartitionSpec(*map(axes_of.get, n))) for n in of]
      for of in (names[1], names[0])
    )
    return mesh, compute_shard, results, tuple(inputs)

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


def constrain(x):
  """Shard [*b, t, h, c] over a run's mesh, where JAX knows it.

  Shards of a parameter could otherwise spread to its products, and divide the
  heads and their channels.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = dict(mesh.shape)
  if not {*BATCH, TENSOR, CONTEXT} <= sizes.keys() or mesh.manual_axes:
    return x
  axes = [BATCH, CONTEXT, TENSOR]
  spec = [None] * x.ndim
  for at, names in zip((0, x.ndim - 3, x.ndim - 2), axes, strict=True):
    count = math.prod(sizes[n] for n in names) if at == 0 else sizes[names]
    if x.shape[at] % count == 0:
      spec[at] = names
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _names(arguments, gradients):
  """Name the axes of (arguments, results); None is not partitioned.

  Batch axes are 'b0', 'b1', …, positions 't' in self-attention, heads 'h' and
  key heads 'g'. A single key head is not partitioned.
  """
  query, key, _, options, *others = arguments
  batch = [f'b{i}' for i in range(query.ndim - 3)]
  sizes = dict(zip((*batch, 't', 'h'), query.shape, strict=False))
  if query.shape[-3] != key.shape[-3] or options.vector is not None:
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

  of_inputs, _ = names
  inputs, results = (
    ', '.join(' '.join(map(word, n)) for n in each) for each in names
  )
  special['need_replication_factors'] = tuple(lone)
  if any('t' in names for names in of_inputs):
    special['permutation_factors'] = ('t',)
  return f'{inputs} -> {results}', special


def _partitioned_axes(mesh, infos, query_names, key_names):
  """Return the mesh axes that partition query and key, by axis name."""
  axes_of, cut = {}, []
  for info, names in zip(infos, (query_names, key_names), strict=False):
    spec = getattr(info.sharding, 'spec', ())
    for name, axes, size in zip(names, spec, info.shape, strict=False):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      count = math.prod(mesh.shape[a] for a in axes)
      if name and axes and size % count == 0:
        axes_of[name] = axes
        cut += [axes] if name == 't' else []
  if cut != [(CONTEXT,)] * 2:  # others store parameters, and cut by accident
    axes_of.pop('t', None)
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
