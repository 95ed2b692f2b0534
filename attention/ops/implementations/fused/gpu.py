"""Kernels for NVIDIA GPUs, in Pallas through Triton.

Each program computes a block of queries, or of keys, of one head and row of the
batch, and loops over the blocks of the other that the mask leaves. Exponents
are to base 2, as the hardware's are.
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
  ArraySums,
  DistanceSums,
)
from attention.ops.implementations.fused.gpu_tiles import (
  GpuTile,
  key_spans,
  load,
  load_numbers,
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

_PROGRAMS = 256  # that a GPU should have at once: two on each multiprocessor
_MOST_PARTS = 16  # of a bias's gradient


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How a kernel's work is cut, and how many threads share a program."""

  queries: int
  keys: int
  warps: int = 4
  stages: int = 2

  @classmethod
  def choose(cls, shape: Shape, itemsize: int, is_forward: bool) -> 'Blocks':
    """By the bytes of a head's channels, which shared memory has to hold."""
    size = max(_power(shape.key_size), _power(shape.value_size)) * itemsize
    if is_forward:
      sizes = {128: (128, 64, 4, 3), 256: (128, 64, 8, 2), 512: (64, 32, 4, 2)}
    else:
      sizes = {128: (64, 64, 4, 2), 256: (64, 64, 8, 2), 512: (32, 32, 4, 2)}
    fallback = (32, 32, 8, 1) if is_forward else (16, 32, 8, 1)
    fits = [sizes[most] for most in sizes if size <= most]
    queries, keys, warps, stages = fits[0] if fits else fallback
    queries = min(queries, _power(shape.num_query))
    keys = min(keys, _power(shape.num_key))
    return cls(queries, keys, warps, stages)


def _power(n):
  """The least power of two from n on, at least 16: products need as much."""
  return max(16, 2 ** math.ceil(math.log2(n)))


def forward(settings, query, key, value, options):
  """(output, largest logit, logarithm of the sum beyond it), to base 2."""
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
  """Gradients of query, key, value and call."""
  shape, arrays = operands.prepare(query, key, value, options)
  blocks = Blocks.choose(shape, query.dtype.itemsize, is_forward=False)
  flat = (shape.rows, shape.num_query, shape.heads)
  # Each query's Σ weight · d_weight, from its output alone (Dao et al. 2022).
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
  shape, blocks, settings, arrays, kernel, axis, cut, heads, likes
):
  """Gradients of the arrays in `likes`, by blocks of their positions."""
  limits = operands.limits(shape, arrays[3], blocks.queries, blocks.keys, axis)
  return _call(
    functools.partial(kernel, shape, blocks),
    settings,
    blocks,
    (pl.cdiv(*cut), heads, shape.rows),
    tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes),
    (*arrays, limits),
  )


def _bias_gradient(settings, shape, blocks, options, arrays):
  """The bias's gradient at its own size, or None."""
  bias = arrays[3].bias
  if bias is None:
    return None
  if isinstance(bias, Distances):
    side = min(blocks.queries, blocks.keys)
    sums = DistanceSums.create(shape, bias, arrays[3].conditions, side, side)
  else:
    sums = ArraySums.create(
      shape, bias, arrays[3].conditions, blocks.queries, blocks.keys
    )
  blocks = dataclasses.replace(blocks, queries=sums.queries, keys=sums.keys)
  parts = min(sums.steps, _MOST_PARTS, -(-_PROGRAMS // math.prod(sums.grid)))
  like = jax.ShapeDtypeStruct((parts, *sums.output_shape), jnp.float32)
  (total,) = _call(
    functools.partial(_bias_kernel, shape, sums, parts),
    settings,
    blocks,
    (*sums.grid, parts),
    (like,),
    arrays,
  )
  return sums.finish(total.sum(0), options.bias)


def _call(kernel, settings, blocks, grid, outputs, arrays):
  """A kernel of (place in the grid, references, references of outputs)."""
  leaves, tree = jax.tree.flatten(arrays)

  def body(*refs):
    inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
    # One axis: the others of CUDA's grids end at 65,535.
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
  """Folds step(is_whole, number, carry) over spans (first, last, is_whole)."""
  for first, last, is_whole in spans:
    body = functools.partial(step, is_whole)
    carry = lax.fori_loop(first, last, body, carry)
  return carry


def _forward_kernel(shape, blocks, place, inputs, outputs):
  """The running softmax of a block of queries (Dao et al. 2022)."""
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
  values = jnp.zeros((blocks.queries, _power(shape.value_size)), jnp.float32)
  spans = key_spans(shape, options, limits, blocks, row, head, block)
  carry = (top, jnp.zeros_like(top), values)
  top, total, values = _fold(step, carry, spans)
  if options.sinks is not None:
    sink = options.sinks[head].astype(jnp.float32) * LOG2E
    total = total + jnp.exp2(sink - top)
  # Fully masked: an infinite denominator, so zero weights, here and backwards.
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
    load_numbers(top, row, queries, head, block, 0.0),
    # Beyond the last query: an infinite denominator, so zero weights.
    load_numbers(log_total, row, queries, head, block, jnp.inf),
    load_numbers(delta, row, queries, head, block, 0.0),
  )


def _query_kernel(shape, blocks, place, inputs, outputs):
  """The query's gradient."""
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

  total = jnp.zeros((blocks.queries, _power(shape.key_size)), jnp.float32)
  spans = key_spans(shape, options, limits, blocks, row, head, block)
  total = _fold(step, total, spans) * options.scale
  store(outputs[0], total, row, queries, head, blocks.queries)


def _key_kernel(shape, blocks, place, inputs, outputs):
  """Gradients of key and value, over the query heads that share them."""
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
    jnp.zeros((blocks.keys, _power(size)), jnp.float32)
    for size in (shape.key_size, shape.value_size)
  )
  if shape.shared == 1:
    dk, dv = head_step(0, carry)
  else:
    dk, dv = lax.fori_loop(0, shape.shared, head_step, carry)
  store(outputs[0], dk * options.scale, row, keys, group, blocks.keys)
  store(outputs[1], dv, row, keys, group, blocks.keys)


def _bias_kernel(shape, sums, parts, place, inputs, outputs):
  """A tile of the bias's gradient: the logits' over all that share the tile."""
  *place, part = place
  query_ref, key_ref, value_ref, options, saved = inputs

  def step(number, total):
    row, head, query_block, key_block = sums.at(place, number)
    queries = query_block * sums.queries + jnp.arange(sums.queries)
    keys = key_block * sums.keys + jnp.arange(sums.keys)
    group = lax.div(head, shape.shared)
    query = load(query_ref, row, queries, head, sums.queries)
    key = load(key_ref, row, keys, group, sums.keys)
    value = load(value_ref, row, keys, group, sums.keys)
    d_output, top, log_total, delta = _load_saved(
      saved, row, queries, head, sums.queries
    )
    tile = GpuTile(
      shape, options, row, head, queries[:, None], keys[None], False
    )
    x, _ = tile.logits(dot(query, key, (1, 1)))
    weights = jnp.exp2(x - top[:, None] - log_total[:, None])
    d_weights = tile.drop(dot(d_output, value, (1, 1)))
    return total + weights * (d_weights - delta[:, None])

  steps = sums.count(place)
  each = lax.div(steps + parts - 1, parts)
  first = part * each
  total = jnp.zeros((sums.queries, sums.keys), jnp.float32)
  last = jnp.minimum(steps, first + each)
  total = lax.fori_loop(first, last, step, total)
  indices, mask, total = sums.entries(place, total)
  triton.store(outputs[0].at[part, *indices], total, mask=mask)
