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

from attention.ops.conditions import LEAST
from attention.ops.implementations.base import gradient_of_options
from attention.ops.implementations.fused import operands
from attention.ops.implementations.fused.bias_gradient import (
  ArrayReduction,
  DistanceReduction,
)
from attention.ops.implementations.fused.gpu_launch import Launch, next_power
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
)
from attention.ops.implementations.fused.tile import dot

_MIN_PROGRAMS = 600  # to fill a GPU: four per multiprocessor, or more
_MAX_PARTS = 16  # that a bias gradient is split into


def forward(settings, query, key, value, options):
  """(output, largest logit, log of the denominator above it), both base 2."""
  shape, arrays = operands.prepare(query, key, value, options)
  launch = Launch.choose('forward', shape, arrays, settings)
  output = jax.ShapeDtypeStruct(
    (shape.rows, shape.num_query, shape.heads, shape.value_size), query.dtype
  )
  stats = jax.ShapeDtypeStruct(
    (shape.rows, shape.heads, shape.num_query), jnp.float32
  )
  limits = operands.limits(shape, arrays[3], launch.queries, launch.keys, 0)
  output, *stats = _call(
    functools.partial(_forward_kernel, shape, launch),
    launch,
    (pl.cdiv(shape.num_query, launch.queries), shape.heads, shape.rows),
    (output, stats, stats),
    (*arrays, limits),
  )
  lead = query.shape[:-1]
  return [
    output.reshape(*lead, -1),
    *(x.swapaxes(1, 2).reshape(lead) for x in stats),
  ]


def backward(
  settings, query, key, value, options, output, top, log_total, d_output
):
  """Gradients of query, key, value and options."""
  shape, arrays = operands.prepare(query, key, value, options)
  # Each query's Σ weight · d_weight, from its output (Dao et al. 2022).
  delta = (d_output.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)
  arrays = (*arrays, _saved(shape, d_output, top, log_total, delta))
  (dq,) = _gradients(_query_kernel, 'query', settings, shape, arrays)
  dk, dv = _gradients(_key_kernel, 'key', settings, shape, arrays)
  d_bias = _bias_gradient(settings, shape, arrays, options.bias)
  d_sinks = operands.sinks_gradient(options, top, log_total, delta)
  return (
    dq.reshape(query.shape),
    dk.reshape(key.shape),
    dv.reshape(value.shape),
    gradient_of_options(options, bias=d_bias, sinks=d_sinks),
  )


def _saved(shape, d_output, *stats):
  """d_output [rows, q, h, e], and statistics [rows, h, q] for fast loads."""
  flat = shape.rows, shape.num_query, shape.heads
  stats = (x.reshape(flat).swapaxes(1, 2) for x in stats)
  return (d_output.reshape(*flat, -1), *stats)


def _gradients(kernel, name, settings, shape, arrays):
  """Gradients of 'query', or of 'key' and value: a program per block of it."""
  launch = Launch.choose(name, shape, arrays, settings)
  if name == 'query':
    axis, heads, likes = 0, shape.heads, arrays[:1]
    blocks = pl.cdiv(shape.num_query, launch.queries)
  else:
    axis, heads, likes = 1, shape.groups, arrays[1:3]
    blocks = pl.cdiv(shape.num_key, launch.keys)
  limits = operands.limits(shape, arrays[3], launch.queries, launch.keys, axis)
  return _call(
    functools.partial(kernel, shape, launch),
    launch,
    (blocks, heads, shape.rows),
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes),
    (*arrays, limits),
  )


def _bias_gradient(settings, shape, arrays, bias):
  """The gradient of the options' bias, or None without a bias."""
  operand, conditions = arrays[3].bias, arrays[3].conditions
  if operand is None:
    return None
  launch = Launch.choose('bias', shape, arrays, settings)
  if isinstance(operand, Distances):
    side = min(launch.queries, launch.keys)
    launch = dataclasses.replace(launch, queries=side, keys=side)
    reduction = DistanceReduction.create(shape, operand, conditions, side, side)
  else:
    reduction = ArrayReduction.create(
      shape, operand, conditions, launch.queries, launch.keys
    )
  parts = min(
    reduction.steps, _MAX_PARTS, -(-_MIN_PROGRAMS // math.prod(reduction.grid))
  )
  like = jax.ShapeDtypeStruct((parts, *reduction.output_shape), jnp.float32)
  (total,) = _call(
    functools.partial(_bias_kernel, shape, launch, reduction, parts),
    launch,
    (*reduction.grid, parts),
    (like,),
    arrays,
  )
  return reduction.finish(total.sum(0), bias)


def _call(kernel, launch, grid, outputs, arrays):
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
      num_warps=launch.warps, num_stages=launch.stages
    ),
    interpret=launch.interpret,
    name='attention' + kernel.func.__name__,
  )(*leaves)


def _fold(step, carry, spans):
  """Fold step(is_whole, number, carry) over spans (first, last, is_whole)."""
  for first, last, is_whole in spans:
    body = functools.partial(step, is_whole)
    carry = lax.fori_loop(first, last, body, carry)
  return carry


def _tiles(shape, options, launch):
  """Make (row, head, queries, keys, is_whole) -> `GpuTile`."""
  return functools.partial(GpuTile, shape, options, interpret=launch.interpret)


def _last_first(shape, launch, place):
  """Reverse the query blocks: causal masks leave most to the last ones."""
  block, *rest = place
  return pl.cdiv(shape.num_query, launch.queries) - 1 - block, *rest


def _forward_kernel(shape, launch, place, inputs, outputs):
  """The online softmax of a query block (Dao et al. 2022)."""
  block, head, row = _last_first(shape, launch, place)
  query_ref, key_ref, value_ref, options, limits = inputs
  tile_at = _tiles(shape, options, launch)
  output_ref, top_ref, log_total_ref = outputs
  queries = block * launch.queries + jnp.arange(launch.queries)
  query = load(query_ref, row, queries, head, launch.queries)
  group = lax.div(head, shape.shared)

  def step(is_whole, number, carry):
    top, total, values = carry
    keys = number * launch.keys + jnp.arange(launch.keys)
    key = load(key_ref, row, keys, group, launch.keys)
    tile = tile_at(row, head, queries[:, None], keys[None], is_whole)
    x, _ = tile.logits(dot(query, key, (1, 1)))
    new_top = jnp.maximum(top, x.max(1))
    shrink = jnp.exp2(top - new_top)
    weights = tile.exp2(x - new_top[:, None])
    total = total * shrink + weights.sum(1)
    value = load(value_ref, row, keys, group, launch.keys)
    weights = tile.drop(weights).astype(value.dtype)
    values = values * shrink[:, None] + dot(weights, value, (1, 0))
    return new_top, total, values

  top = jnp.full((launch.queries,), LEAST * LOG2E, jnp.float32)
  values = jnp.zeros(
    (launch.queries, next_power(shape.value_size)), jnp.float32
  )
  spans = key_spans(shape, options, limits, launch, row, head, block)
  carry = (top, jnp.zeros_like(top), values)
  top, total, values = _fold(step, carry, spans)
  if options.sinks is not None:
    sink = options.sinks[head].astype(jnp.float32) * LOG2E
    total = total + jnp.exp2(sink - top)
  # An infinite denominator zeroes the weights of fully masked rows in both
  # passes.
  total = jnp.where(total > 0, total, jnp.inf)
  store(output_ref, values / total[:, None], row, queries, head, launch.queries)
  for ref, x in ((top_ref, top), (log_total_ref, jnp.log2(total))):
    mask = (
      None
      if shape.num_query % launch.queries == 0
      else (queries < shape.num_query)
    )
    triton.store(ref.at[row, head, queries], x, mask=mask)


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


def _logits_gradient(tile, x, d_weights, top, log_total, delta):
  """weight · (d_weight - delta), with one operation less per logit."""
  share = jnp.exp2(-log_total)
  rest = tile.multiply_add(d_weights, share[:, None], -(delta * share)[:, None])
  return tile.exp2(x - top[:, None]) * rest


def _query_kernel(shape, launch, place, inputs, outputs):
  """The gradient of a query block."""
  block, head, row = _last_first(shape, launch, place)
  query_ref, key_ref, value_ref, options, saved, limits = inputs
  tile_at = _tiles(shape, options, launch)
  queries = block * launch.queries + jnp.arange(launch.queries)
  query = load(query_ref, row, queries, head, launch.queries)
  d_output, top, log_total, delta = _load_saved(
    saved, row, queries, head, launch.queries
  )
  group = lax.div(head, shape.shared)

  def step(is_whole, number, total):
    keys = number * launch.keys + jnp.arange(launch.keys)
    key = load(key_ref, row, keys, group, launch.keys)
    value = load(value_ref, row, keys, group, launch.keys)
    tile = tile_at(row, head, queries[:, None], keys[None], is_whole)
    x, slope = tile.logits(dot(query, key, (1, 1)))
    d_weights = tile.drop(dot(d_output, value, (1, 1)))
    d_logits = _logits_gradient(tile, x, d_weights, top, log_total, delta)
    if slope is not None:
      d_logits = d_logits * slope
    return total + dot(d_logits.astype(key.dtype), key, (1, 0))

  total = jnp.zeros((launch.queries, next_power(shape.key_size)), jnp.float32)
  spans = key_spans(shape, options, limits, launch, row, head, block)
  total = _fold(step, total, spans) * options.scale
  store(outputs[0], total, row, queries, head, launch.queries)


def _key_kernel(shape, launch, place, inputs, outputs):
  """Gradients of a key and value block, over the query heads that share it."""
  block, group, row = place
  query_ref, key_ref, value_ref, options, saved, limits = inputs
  tile_at = _tiles(shape, options, launch)
  keys = block * launch.keys + jnp.arange(launch.keys)
  key = load(key_ref, row, keys, group, launch.keys)
  value = load(value_ref, row, keys, group, launch.keys)

  def step(head, is_whole, number, carry):
    dk, dv = carry
    queries = number * launch.queries + jnp.arange(launch.queries)
    query = load(query_ref, row, queries, head, launch.queries)
    d_output, top, log_total, delta = _load_saved(
      saved, row, queries, head, launch.queries
    )
    tile = tile_at(row, head, queries[None], keys[:, None], is_whole)
    x, slope = tile.logits(dot(key, query, (1, 1)))
    weights = tile.exp2(x - top[None] - log_total[None])
    used = tile.drop(weights).astype(d_output.dtype)
    dv = dv + dot(used, d_output, (1, 0))
    d_weights = tile.drop(dot(value, d_output, (1, 1)))
    d_logits = weights * (d_weights - delta[None])
    if slope is not None:
      d_logits = d_logits * slope
    return dk + dot(d_logits.astype(query.dtype), query, (1, 0)), dv

  def head_step(number, carry):
    head = group * shape.shared + number
    spans = query_spans(shape, options, limits, launch, row, head, block)
    return _fold(functools.partial(step, head), carry, spans)

  carry = tuple(
    jnp.zeros((launch.keys, next_power(size)), jnp.float32)
    for size in (shape.key_size, shape.value_size)
  )
  if shape.shared == 1:
    dk, dv = head_step(0, carry)
  else:
    dk, dv = lax.fori_loop(0, shape.shared, head_step, carry)
  store(outputs[0], dk * options.scale, row, keys, group, launch.keys)
  store(outputs[1], dv, row, keys, group, launch.keys)


def _bias_kernel(shape, launch, reduction, parts, place, inputs, outputs):
  """A tile of the bias gradient, reduced over all that share it."""
  *place, part = place
  query_ref, key_ref, value_ref, options, saved = inputs
  tile_at = _tiles(shape, options, launch)

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
    tile = tile_at(row, head, queries[:, None], keys[None], False)
    x, _ = tile.logits(dot(query, key, (1, 1)))
    d_weights = tile.drop(dot(d_output, value, (1, 1)))
    return total + _logits_gradient(tile, x, d_weights, top, log_total, delta)

  steps = reduction.count(place)
  each = lax.div(steps + parts - 1, parts)
  first = part * each
  total = jnp.zeros((reduction.queries, reduction.keys), jnp.float32)
  last = jnp.minimum(steps, first + each)
  total = lax.fori_loop(first, last, step, total)
  indices, mask, total = reduction.entries(place, total)
  triton.store(outputs[0].at[part, *indices], total, mask=mask)
