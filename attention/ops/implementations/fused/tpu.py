"""Pallas kernels for TPUs.

Each program computes a tile of keys × queries of one head and batch row. The
last grid axis iterates in order over the blocks that are not fully masked,
while accumulators stay in vector memory. Exponentials and logarithms are
base 2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.ops.conditions import LEAST
from attention.ops.implementations.base import gradient_of_options
from attention.ops.implementations.fused import operands
from attention.ops.implementations.fused.bias_gradient import (
  ArrayReduction,
  DistanceReduction,
)
from attention.ops.implementations.fused.operands import (
  LOG2E,
  Distances,
  sinks_gradient,
)
from attention.ops.implementations.fused.tile import dot
from attention.ops.implementations.fused.tpu_blocks import (
  Block,
  BlockSizes,
  Place,
  Ranges,
  TpuTile,
  is_block,
  lay_out,
  of_keys,
  of_queries,
  positions,
  restore,
  restore_entries,
)


def forward(settings, query, key, value, options):
  """(output, largest logit, log of the denominator above it), both base 2."""
  shape, sizes, rows, inputs = _prepare(settings, query, key, value, options)
  ranges = Ranges.create(shape, rows, sizes, 0)
  length, width = inputs[0].array.shape[3], inputs[2].array.shape[2]
  lead = shape.rows, shape.heads
  output, stats = (
    Block(
      jax.ShapeDtypeStruct((*lead, size, length), dtype),
      (None, None, size, sizes.queries),
      of_queries,
    )
    for size, dtype in ((width, query.dtype), (2, jnp.float32))
  )
  statistic = pltpu.VMEM((1, sizes.queries), jnp.float32)
  output, stats = _call(
    functools.partial(_forward_kernel, shape, sizes, ranges.steps),
    settings,
    (*lead, length // sizes.queries, ranges.steps),
    _query_place,
    (*inputs, ranges),
    (output, stats),
    (statistic, statistic, _accumulator(output)),
  )
  batch = query.shape[:-1]
  output = restore(output, shape.num_query, shape.value_size)
  stats = restore(stats, shape.num_query, 2)
  return (
    output.reshape(*batch, shape.value_size),
    *(stats[..., i].reshape(batch) for i in (0, 1)),
  )


def backward(
  settings, query, key, value, options, output, top, log_total, d_output
):
  """Gradients of query, key, value and options."""
  shape, sizes, rows, inputs = _prepare(settings, query, key, value, options)
  # Each query's Σ weight · d_weight, from its output (Dao et al. 2022).
  delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
  flat = shape.rows, shape.num_query, shape.heads, -1
  d_output = positions(d_output.reshape(flat), sizes.queries, of_queries)
  stats = _stats(shape, sizes, (top, log_total, delta))
  inputs = (*inputs, d_output, stats)

  def run(kernel, axis, place_of, likes):
    ranges = Ranges.create(shape, rows, sizes, axis)
    heads, steps = shape.heads, ranges.steps
    if axis == 1:
      heads, steps = shape.groups, shape.shared * steps
    blocks = likes[0].array.shape[3] // likes[0].size[3]
    return _call(
      functools.partial(kernel, shape, sizes, steps),
      settings,
      (shape.rows, heads, blocks, steps),
      place_of,
      (*inputs, ranges),
      [_like(x) for x in likes],
      [_accumulator(x) for x in likes],
    )

  (dq,) = run(_query_kernel, 0, _query_place, inputs[:1])
  key_place = functools.partial(_key_place, shape.shared)
  dk, dv = run(_key_kernel, 1, key_place, inputs[1:3])
  d_bias = _bias_gradient(settings, shape, sizes, options, rows, inputs)
  return (
    restore(dq, shape.num_query, shape.key_size).reshape(query.shape),
    restore(dk, shape.num_key, shape.key_size).reshape(key.shape),
    restore(dv, shape.num_key, shape.value_size).reshape(value.shape),
    gradient_of_options(
      options, bias=d_bias, sinks=sinks_gradient(options, top, log_total, delta)
    ),
  )


def _stats(shape, sizes, arrays):
  """Stack (top, log_total, delta) as one `Block` [3, queries]."""
  flat = shape.rows, shape.num_query, shape.heads, 1
  # Padded queries get an infinite denominator, so zero weights.
  rows = [
    positions(x.reshape(flat), sizes.queries, of_queries, 1, fill).array
    for x, fill in zip(arrays, (0.0, jnp.inf, 0.0), strict=True)
  ]
  size = (None, None, len(rows), sizes.queries)
  return Block(jnp.concatenate(rows, 2), size, of_queries)


def _prepare(settings, query, key, value, options):
  """(shape, `BlockSizes`, operands by row, inputs of all kernels)."""
  shape, (query, key, value, rows) = operands.prepare(
    query, key, value, options
  )
  sizes = BlockSizes.choose(shape, query.dtype.itemsize, settings.most)
  if isinstance(rows.bias, Distances):
    # Its gradient is reduced along diagonals of square tiles.
    side = min(sizes.queries, sizes.keys)
    sizes = BlockSizes(side, side)
  index = of_keys(shape.shared)
  inputs = (
    positions(query, sizes.queries, of_queries),
    positions(key, sizes.keys, index),
    positions(value, sizes.keys, index),
    lay_out(shape, rows, sizes),
  )
  return shape, sizes, rows, inputs


def _bias_gradient(settings, shape, sizes, options, rows, inputs):
  """The bias's gradient in the bias's shape, or None without a bias."""
  bias = rows.bias
  if bias is None:
    return None
  is_array = not isinstance(bias, Distances)
  kind = ArrayReduction if is_array else DistanceReduction
  reduction = kind.create(
    shape, bias, rows.conditions, sizes.queries, sizes.keys
  )
  if is_array:
    output = _like(inputs[3].bias, jnp.float32)
  else:
    output = Block(
      jax.ShapeDtypeStruct(reduction.output_shape, jnp.float32),
      (None, None, sizes.keys, sizes.queries),
      lambda place: (*reduction.tile_of(*place[:4]), 0, 0),
    )

  def place_of(ids, _):
    *place, number = ids
    count = reduction.count(place)
    at = reduction.at(place, jnp.minimum(number, jnp.maximum(count - 1, 0)))
    return Place(*at, number < count)

  (total,) = _call(
    functools.partial(_bias_kernel, shape, sizes, output.is_column),
    settings,
    (*reduction.grid, reduction.steps),
    place_of,
    inputs,
    (output,),
    (),
  )
  if is_array:
    total = restore_entries(total, output, bias.array.shape)
  else:
    total = total.swapaxes(2, 3)
  return reduction.finish(total, options.bias)


def _like(block, dtype=None):
  """An output `Block` laid out like an input `Block`."""
  x = block.array
  array = jax.ShapeDtypeStruct(x.shape, dtype or x.dtype)
  return dataclasses.replace(block, array=array)


def _accumulator(block):
  """Vector memory to accumulate a block in float32."""
  return pltpu.VMEM(block.size[2:], jnp.float32)


def _query_place(ids, inputs):
  row, head, block, step = ids
  key, is_needed = inputs[-1].at(row, head, block, step)
  return Place(row, head, block, key, is_needed)


def _key_place(shared, ids, inputs):
  row, group, block, step = ids
  ranges = inputs[-1]
  head = group * shared + lax.div(step, ranges.steps)
  query, is_needed = ranges.at(row, head, block, lax.rem(step, ranges.steps))
  return Place(row, head, query, block, is_needed)


def _call(kernel, settings, grid, place_of, inputs, outputs, scratch):
  """Run a kernel and return the arrays of its outputs.

  Args:
    kernel: called as kernel(place, step, inputs, outputs, scratch), with a
      `Place`, the step along the grid's last axis, and references in place of
      arrays.
    settings: the implementation, `Tpu`.
    grid: the grid's shape; all axes but the last are independent.
    place_of: maps a program's grid indices and the inputs to a `Place`.
    inputs: a pytree of `Block`s and of scalar arrays, which go to scalar
      memory.
    outputs: a tuple of `Block`s whose arrays are shapes.
    scratch: the vector memory that the kernel keeps between steps.

  Returns:
    A list of arrays, one for each output.
  """
  leaves, tree = jax.tree.flatten(inputs, is_leaf=is_block)
  scalars = [x for x in leaves if not is_block(x)]
  blocks = [x for x in leaves if is_block(x)]

  def inputs_of(scalar_refs, block_refs):
    scalar_refs, block_refs = iter(scalar_refs), iter(block_refs)
    refs = [
      dataclasses.replace(x, array=next(block_refs))
      if is_block(x)
      else next(scalar_refs)
      for x in leaves
    ]
    return jax.tree.unflatten(tree, refs)

  def spec(block):
    def index(*args):
      ids, refs = args[: len(grid)], args[len(grid) :]
      found = block.index(place_of(ids, inputs_of(refs, blocks)))
      return tuple(jnp.asarray(i, jnp.int32) for i in found)

    return pl.BlockSpec(block.size, index)

  def body(*refs):
    counts = len(scalars), len(blocks), len(outputs)
    ends = np.cumsum(counts)
    scalar_refs, block_refs, output_refs, scratch_refs = (
      refs[i:j] for i, j in zip((0, *ends), (*ends, len(refs)), strict=True)
    )
    found = inputs_of(scalar_refs, block_refs)
    ids = [pl.program_id(i) for i in range(len(grid))]
    kernel(place_of(ids, found), ids[-1], found, output_refs, scratch_refs)

  return pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=[spec(x) for x in blocks],
      out_specs=[spec(x) for x in outputs],
      scratch_shapes=scratch,
    ),
    out_shape=[x.array for x in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * (len(grid) - 1) + ('arbitrary',)
    ),
    interpret=settings.interpret,
    name='attention' + kernel.func.__name__,
  )(*scalars, *(x.array for x in blocks))


def _tile(shape, sizes, place, options):
  queries = place.query * sizes.queries + lax.broadcasted_iota(
    jnp.int32, (1, sizes.queries), 1
  )
  keys = place.key * sizes.keys + lax.broadcasted_iota(
    jnp.int32, (sizes.keys, 1), 0
  )
  return TpuTile(shape, options, place.row, place.head, queries, keys, False)


def _forward_kernel(shape, sizes, steps, place, step, inputs, outputs, scratch):
  """The online softmax of a query block (Dao et al. 2022)."""
  query, key, value, options, _ = inputs
  top, total, values = scratch

  @pl.when(step == 0)
  def _():
    top[...] = jnp.full(top.shape, LEAST * LOG2E, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    values[...] = jnp.zeros(values.shape, jnp.float32)

  @pl.when(place.is_needed)
  def _():
    tile = _tile(shape, sizes, place, options)
    x, _ = tile.logits(dot(key.read(), query.read(), (0, 0)))
    new_top = jnp.maximum(top[...], x.max(0, keepdims=True))
    shrink = jnp.exp2(top[...] - new_top)
    weights = jnp.exp2(x - new_top)
    top[...] = new_top
    total[...] = total[...] * shrink + weights.sum(0, keepdims=True)
    weights = tile.drop(weights)
    v = value.read()
    values[...] = values[...] * shrink + dot(v, weights.astype(v.dtype), (1, 0))

  @pl.when(step == steps - 1)
  def _():
    output, stats = outputs
    denominator = total[...]
    if options.sinks is not None:
      sink = options.sinks[place.head].astype(jnp.float32) * LOG2E
      denominator = denominator + jnp.exp2(sink - top[...])
    # An infinite denominator zeroes the weights of fully masked rows in both
    # passes.
    denominator = jnp.where(denominator > 0, denominator, jnp.inf)
    output[...] = (values[...] / denominator).astype(output.dtype)
    stats[0:1, :] = top[...]
    stats[1:2, :] = jnp.log2(denominator)


def _gradients(shape, sizes, place, inputs):
  """A tile's weights after dropout; gradients of its logits and products."""
  query, key, value, options, d_output, stats, *_ = inputs
  top, log_total, delta = (stats.array[i : i + 1, :] for i in range(3))
  tile = _tile(shape, sizes, place, options)
  x, slope = tile.logits(dot(key.read(), query.read(), (0, 0)))
  weights = jnp.exp2(x - top - log_total)
  d_weights = tile.drop(dot(value.read(), d_output.read(), (0, 0)))
  d_logits = weights * (d_weights - delta)
  d_products = d_logits if slope is None else d_logits * slope
  return tile.drop(weights), d_logits, d_products


def _accumulating(kernel):
  """Wrap a kernel to zero its accumulators first and store them last."""

  def run(shape, sizes, steps, place, step, inputs, outputs, sums):
    @pl.when(step == 0)
    def _():
      for total in sums:
        total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(place.is_needed)
    def _():
      kernel(shape, sizes, place, inputs, sums)

    @pl.when(step == steps - 1)
    def _():
      for output, total in zip(outputs, sums, strict=True):
        output[...] = total[...].astype(output.dtype)

  return functools.wraps(kernel)(run)


@_accumulating
def _query_kernel(shape, sizes, place, inputs, sums):
  """Accumulate the gradient of a query block."""
  key = inputs[1].read()
  _, _, d_products = _gradients(shape, sizes, place, inputs)
  d_products = (d_products * inputs[3].scale).astype(key.dtype)
  sums[0][...] += dot(key, d_products, (1, 0))


@_accumulating
def _key_kernel(shape, sizes, place, inputs, sums):
  """Accumulate gradients of a key and value block, over heads that share it."""
  query, d_output = inputs[0].read(), inputs[4].read()
  used, _, d_products = _gradients(shape, sizes, place, inputs)
  d_products = (d_products * inputs[3].scale).astype(query.dtype)
  sums[0][...] += dot(query, d_products, (1, 1))
  sums[1][...] += dot(d_output, used.astype(d_output.dtype), (1, 1))


def _bias_kernel(
  shape, sizes, is_column, place, step, inputs, outputs, scratch
):
  """A tile of the bias gradient, reduced over all that share it."""
  del scratch
  (total,) = outputs

  @pl.when(step == 0)
  def _():
    total[...] = jnp.zeros(total.shape, total.dtype)

  @pl.when(place.is_needed)
  def _():
    _, d_logits, _ = _gradients(shape, sizes, place, inputs)
    if is_column:
      d_logits = d_logits.T
    for axis in (0, 1):
      if total.shape[axis] == 1:
        d_logits = d_logits.sum(axis, keepdims=True)
    total[...] += d_logits
