"""Pallas Triton kernels for NVIDIA GPUs.

Each program computes a query block, or a key block, of one head and batch row.
It loops over the blocks of the other axis that are not fully masked.
Exponentials and logarithms are base 2, as in hardware.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from attention.ops.implementations.base import gradient_of_options
from attention.ops.implementations.fused import operands
from attention.ops.implementations.fused.bias_gradient import (
  ArrayReduction,
  DistanceReduction,
)
from attention.ops.implementations.fused.gpu_tiles import (
  GpuTile,
  key_spans,
  load,
  load_scalars,
  query_spans,
  store,
)
from attention.ops.implementations.fused.operands import (
  LOG2E,
  Distances,
  Shape,
)
from attention.ops.implementations.fused.tile import dot
from attention.ops.masks import LEAST

_MIN_PROGRAMS = 256  # to fill a GPU: two per multiprocessor
_MAX_PARTS = 16  # that a bias gradient is split into


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block sizes of a kernel, and its warps and pipeline stages."""

  queries: int
  keys: int
  warps: int = 4
  stages: int = 2

  @classmethod
  def choose(cls, shape: Shape, itemsize: int, is_forward: bool) -> 'Blocks':
    """Choose sizes that fit in shared memory, by the bytes per head."""
    size = (
      max(_next_power(shape.key_size), _next_power(shape.value_size)) * itemsize
    )
    if is_forward:
      sizes = {128: (128, 64, 4, 3), 256: (128, 64, 8, 2), 512: (64, 32, 4, 2)}
    else:
      sizes = {128: (64, 64, 4, 2), 256: (64, 64, 8, 2), 512: (32, 32, 4, 2)}
    fallback = (32, 32, 8, 1) if is_forward else (16, 32, 8, 1)
    fits = [sizes[limit] for limit in sizes if size <= limit]
    queries, keys, warps, stages = fits[0] if fits else fallback
    queries = min(queries, _next_power(shape.num_query))
    keys = min(keys, _next_power(shape.num_key))
    return cls(queries, keys, warps, stages)


def _next_power(n):
  """The least power of two >= n and >= 16, the smallest matmul size."""
  return max(16, 2 ** math.ceil(math.log2(n)))


def forward(settings, query, key, value, options):
  """(output, largest logit, log of the denominator above it), both base 2."""
  shape, arrays = operands.prepare(query, key, value, options)
  blocks = Blocks.choose(shape, query.dtype.itemsize, is_forward=True)
  stats = jax.ShapeDtypeStruct(
    (shape.rows, shape.num_query, shape.heads), jnp.float32
  )
  output = jax.ShapeDtypeStruct((*stats.shape, shape.value_size), query.dtype)
  limits = operands.limits(shape, arrays[3], blocks.queries, blocks.keys, 0)
  grid = (pl.cdiv(shape.num_query, blocks.queries), shape.heads, shape.rows)
  results = _call(
    functools.partial(_forward_kernel, shape, blocks),
    settings,
    blocks,
    grid,
    (output, stats, stats),
    (*arrays, limits),
  )
  lead = query.shape[:-1]
  return [x.reshape(*lead, *x.shape[3:]) for x in results]


def backward(
  settings, query, key, value, options, output, top, log_total, d_output
):
  """Gradients of query, key, value and options."""
  shape, arrays = operands.prepare(query, key, value, options)
  blocks = Blocks.choose(shape, query.dtype.itemsize, is_forward=False)
  flat = (shape.rows, shape.num_query, shape.heads)
  # Each query's Σ weight · d_weight, from its output (Dao et al. 2022).
  delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
  top, log_total, delta = (x.reshape(flat) for x in (top, log_total, delta))
  d_output = d_output.reshape(*flat, -1)
  arrays = (*arrays, (d_output, top, log_total, delta))
  run = functools.partial(_gradients, shape, blocks, settings, arrays)
  (dq,) = run(
    _query_kernel, 0, (shape.num_query, blocks.queries), shape.heads, arrays[:1]
  )
  dk, dv = run(
    _key_kernel, 1, (shape.num_key, blocks.keys), shape.groups, arrays[1:3]
  )
  d_bias = _bias_gradient(settings, shape, blocks, options, arrays)
  d_sinks = operands.sinks_gradient(options, top, log_total, delta)
  return (
    dq.reshape(query.shape),
    dk.reshape(key.shape),
    dv.reshape(value.shape),
    gradient_of_options(options, bias=d_bias, sinks=d_sinks),
  )


def _gradients(
  shape, blocks, settings, arrays, kernel, axis, extent, heads, likes
):
  """Gradients of the arrays `likes`, with a program per block of positions."""
  limits = operands.limits(shape, arrays[3], blocks.queries, blocks.keys, axis)
  return _call(
    functools.partial(kernel, shape, blocks),
    settings,
    blocks,
    (pl.cdiv(*extent), heads, shape.rows),
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes),
    (*arrays, limits),
  )


def _bias_gradient(settings, shape, blocks, options, arrays):
  """The bias's gradient in the bias's shape, or None without a bias."""
  bias = arrays[3].bias
  if bias is None:
    return None
  if isinstance(bias, Distances):
    side = min(blocks.queries, blocks.keys)
    reduction = DistanceReduction.create(
      shape, bias, arrays[3].conditions, side, side
    )
  else:
    reduction = ArrayReduction.create(
      shape, bias, arrays[3].conditions, blocks.queries, blocks.keys
    )
  blocks = dataclasses.replace(
    blocks, queries=reduction.queries, keys=reduction.keys
  )
  parts = min(
    reduction.steps, _MAX_PARTS, -(-_MIN_PROGRAMS // math.prod(reduction.grid))
  )
  like = jax.ShapeDtypeStruct((parts, *reduction.output_shape), jnp.float32)
  (total,) = _call(
    functools.partial(_bias_kernel, shape, reduction, parts),
    settings,
    blocks,
    (*reduction.grid, parts),
    (like,),
    arrays,
  )
  return reduction.finish(total.sum(0), options.bias)


def _call(kernel, settings, blocks, grid, outputs, arrays):
  """Run kernel(grid indices, input references, output references)."""
  leaves, tree = jax.tree.flatten(arrays)

  def body(*refs):
    inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
    # Flatten the grid: CUDA limits all axes but the first to 65,535.
    number, place = pl.program_id(0), []
    for size in grid:
      place.append(lax.rem(number, size))
      number = lax.div(number, size)
    kernel(tuple(place), inputs, refs[len(leaves) :])

  return pl.pallas_call(
    body,
    grid=(math.prod(grid),),
    out_shape=outputs,
    compiler_params=triton.CompilerParams(
      num_warps=blocks.warps, num_stages=blocks.stages
    ),
    interpret=settings.interpret,
    name='attention' + kernel.func.__name__,
  )(*leaves)


def _fold(step, carry, spans):
  """Fold step(is_whole, number, carry) over spans (first, last, is_whole)."""
  for first, last, is_whole in spans:
    body = functools.partial(step, is_whole)
    carry = lax.fori_loop(first, last, body, carry)
  return carry


def _forward_kernel(shape, blocks, place, inputs, outputs):
  """The online softmax of a query block (Dao et al. 2022)."""
  block, head, row = place
  query_ref, key_ref, value_ref, options, limits = inputs
  output_ref, top_ref, log_total_ref = outputs
  queries = block * blocks.queries + jnp.arange(blocks.queries)
  query = load(query_ref, row, queries, head, blocks.queries)
  group = lax.div(head, shape.shared)

  def step(is_whole, number, carry):
    top, total, values = carry
    keys = number * blocks.keys + jnp.arange(blocks.keys)
    key = load(key_ref, row, keys, group, blocks.keys)
    tile = GpuTile(
      shape, options, row, head, queries[:, None], keys[None], is_whole
    )
    x, _ = tile.logits(dot(query, key, (1, 1)))
    new_top = jnp.maximum(top, x.max(1))
    shrink = jnp.exp2(top - new_top)
    weights = jnp.exp2(x - new_top[:, None])
    total = total * shrink + weights.sum(1)
    value = load(value_ref, row, keys, group, blocks.keys)
    weights = tile.drop(weights).astype(value.dtype)
    values = values * shrink[:, None] + dot(weights, value, (1, 0))
    return new_top, total, values

  top = jnp.full((blocks.queries,), LEAST * LOG2E, jnp.float32)
  values = jnp.zeros(
    (blocks.queries, _next_power(shape.value_size)), jnp.float32
  )
  spans = key_spans(shape, options, limits, blocks, row, head, block)
  carry = (top, jnp.zeros_like(top), values)
  top, total, values = _fold(step, carry, spans)
  if options.sinks is not None:
    sink = options.sinks[head].astype(jnp.float32) * LOG2E
    total = total + jnp.exp2(sink - top)
  # An infinite denominator zeroes the weights of fully masked rows in both
  # passes.
  total = jnp.where(total > 0, total, jnp.inf)
  store(output_ref, values / total[:, None], row, queries, head, blocks.queries)
  for ref, x in ((top_ref, top), (log_total_ref, jnp.log2(total))):
    mask = (
      None
      if shape.num_query % blocks.queries == 0
      else (queries < shape.num_query)
    )
    triton.store(ref.at[row, queries, head], x, mask=mask)


def _load_saved(saved, row, queries, head, block):
  """d_output [block, e], and top, log_total and delta [block]."""
  d_output, top, log_total, delta = saved
  return (
    load(d_output, row, queries, head, block),
    load_scalars(top, row, queries, head, block, 0.0),
    # Padded queries get an infinite denominator, so zero weights.
    load_scalars(log_total, row, queries, head, block, jnp.inf),
    load_scalars(delta, row, queries, head, block, 0.0),
  )


def _query_kernel(shape, blocks, place, inputs, outputs):
  """The gradient of a query block."""
  block, head, row = place
  query_ref, key_ref, value_ref, options, saved, limits = inputs
  queries = block * blocks.queries + jnp.arange(blocks.queries)
  query = load(query_ref, row, queries, head, blocks.queries)
  d_output, top, log_total, delta = _load_saved(
    saved, row, queries, head, blocks.queries
  )
  group = lax.div(head, shape.shared)

  def step(is_whole, number, total):
    keys = number * blocks.keys + jnp.arange(blocks.keys)
    key = load(key_ref, row, keys, group, blocks.keys)
    value = load(value_ref, row, keys, group, blocks.keys)
    tile = GpuTile(
      shape, options, row, head, queries[:, None], keys[None], is_whole
    )
    x, slope = tile.logits(dot(query, key, (1, 1)))
    weights = jnp.exp2(x - top[:, None] - log_total[:, None])
    d_weights = tile.drop(dot(d_output, value, (1, 1)))
    d_logits = weights * (d_weights - delta[:, None])
    if slope is not None:
      d_logits = d_logits * slope
    return total + dot(d_logits.astype(key.dtype), key, (1, 0))

  total = jnp.zeros((blocks.queries, _next_power(shape.key_size)), jnp.float32)
  spans = key_spans(shape, options, limits, blocks, row, head, block)
  total = _fold(step, total, spans) * options.scale
  store(outputs[0], total, row, queries, head, blocks.queries)


def _key_kernel(shape, blocks, place, inputs, outputs):
  """Gradients of a key and value block, over the query heads that share it."""
  block, group, row = place
  query_ref, key_ref, value_ref, options, saved, limits = inputs
  keys = block * blocks.keys + jnp.arange(blocks.keys)
  key = load(key_ref, row, keys, group, blocks.keys)
  value = load(value_ref, row, keys, group, blocks.keys)

  def step(head, is_whole, number, carry):
    dk, dv = carry
    queries = number * blocks.queries + jnp.arange(blocks.queries)
    query = load(query_ref, row, queries, head, blocks.queries)
    d_output, top, log_total, delta = _load_saved(
      saved, row, queries, head, blocks.queries
    )
    tile = GpuTile(
      shape, options, row, head, queries[None], keys[:, None], is_whole
    )
    x, slope = tile.logits(dot(key, query, (1, 1)))
    weights = jnp.exp2(x - top[None] - log_total[None])
    used = tile.drop(weights).astype(d_output.dtype)
    dv = dv + dot(used, d_output, (1, 0))
    d_weights = tile.drop(dot(value, d_output, (1, 1)))
    d_logits = weights * (d_weights - delta[None])
    if slope is not None:
      d_logits = d_logits * slope
    return dk + dot(d_logits.astype(query.dtype), query, (1, 0)), dv

  def head_step(number, carry):
    head = group * shape.shared + number
    spans = query_spans(shape, options, limits, blocks, row, head, block)
    return _fold(functools.partial(step, head), carry, spans)

  carry = tuple(
    jnp.zeros((blocks.keys, _next_power(size)), jnp.float32)
    for size in (shape.key_size, shape.value_size)
  )
  if shape.shared == 1:
    dk, dv = head_step(0, carry)
  else:
    dk, dv = lax.fori_loop(0, shape.shared, head_step, carry)
  store(outputs[0], dk * options.scale, row, keys, group, blocks.keys)
  store(outputs[1], dv, row, keys, group, blocks.keys)


def _bias_kernel(shape, reduction, parts, place, inputs, outputs):
  """A tile of the bias gradient, reduced over all that share it."""
  *place, part = place
  query_ref, key_ref, value_ref, options, saved = inputs

  def step(number, total):
    row, head, query_block, key_block = reduction.at(place, number)
    queries = query_block * reduction.queries + jnp.arange(reduction.queries)
    keys = key_block * reduction.keys + jnp.arange(reduction.keys)
    group = lax.div(head, shape.shared)
    query = load(query_ref, row, queries, head, reduction.queries)
    key = load(key_ref, row, keys, group, reduction.keys)
    value = load(value_ref, row, keys, group, reduction.keys)
    d_output, top, log_total, delta = _load_saved(
      saved, row, queries, head, reduction.queries
    )
    tile = GpuTile(
      shape, options, row, head, queries[:, None], keys[None], False
    )
    x, _ = tile.logits(dot(query, key, (1, 1)))
    weights = jnp.exp2(x - top[:, None] - log_total[:, None])
    d_weights = tile.drop(dot(d_output, value, (1, 1)))
    return total + weights * (d_weights - delta[:, None])

  steps = reduction.count(place)
  each = lax.div(steps + parts - 1, parts)
  first = part * each
  total = jnp.zeros((reduction.queries, reduction.keys), jnp.float32)
  last = jnp.minimum(steps, first + each)
  total = lax.fori_loop(first, last, step, total)
  indices, mask, total = reduction.entries(place, total)
  triton.store(outputs[0].at[part, *indices], total, mask=mask)
