"""Kernels in C++ for CPUs; see `attention.ops.cpu_kernels`.

A thread computes some queries of one head, in blocks of queries × keys that fit
in its cache. Masks by position become the first and last key of each query. A
bias by distance is read in place: row i of its logits starts one number before
row i - 1.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import batching
from attention.ops.biases import ArrayBias, Relative
from attention.ops.conditions import Dense, Segments
from attention.ops.implementations.base import gradient_of_options
from attention.ops.implementations.fused import operands

_FEW_QUERIES = 8  # that read keys from a cache's layout
_MANY_KEYS = 32
_FEW_PAIRS = 16
_SPLIT = 512  # queries in each part of the gradient of keys, or more


def refusal(query, key, options) -> str | None:
  """Return why the kernels don't support these arguments, or None."""
  if query.shape[-3] * key.shape[-3] < _FEW_PAIRS:
    return (
      f'expected {_FEW_PAIRS} pairs of queries and keys or more; with fewer, '
      'plain XLA is faster'
    )
  if query.dtype == jnp.float16:
    return 'expected float32 or bfloat16, got float16'
  conditions = () if options.mask is None else options.mask.conditions
  for kind, name in ((Dense, 'dense'), (Segments, 'segment')):
    if sum(isinstance(c, kind) for c in conditions) > 1:
      return f'expected at most one {name} mask'


def forward(settings, query, key, value, options):
  """(output, largest logit, log of the denominator above it), both base 2."""
  del settings
  shape, (query_rows, key, value, extra) = operands.prepare(
    query, key, value, options
  )
  # Decoding keeps its keys as [b, g, d, n] and its values as [b, g, n, e].
  few = shape.num_query * shape.shared <= _FEW_QUERIES
  is_cache = few and shape.num_key >= _MANY_KEYS
  if is_cache:
    key, value = jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2)
  stats = jax.ShapeDtypeStruct(query_rows.shape[:-1], jnp.float32)
  output = jax.ShapeDtypeStruct(
    (*query_rows.shape[:-1], shape.value_size), query.dtype
  )
  results = _call(
    'attention_forward',
    [output, stats, stats],
    (query_rows, key, value, *_arrays(shape, extra)),
    extra,
    is_cache=is_cache,
  )
  lead = query.shape[:-1]
  return [x.reshape(*lead, *x.shape[3:]) for x in results]


def backward(
  settings, query, key, value, options, output, top, log_total, d_output
):
  """Gradients of query, key, value and options."""
  del settings
  shape, (*flat, extra) = operands.prepare(query, key, value, options)
  rows = shape.rows, shape.num_query, shape.heads
  arrays = _arrays(shape, extra)
  shares, splits = _parts(shape, options.bias, extra.bias)
  f32 = jnp.float32
  expected = [
    jax.ShapeDtypeStruct(flat[0].shape, query.dtype),
    *(jax.ShapeDtypeStruct((splits, *x.shape), f32) for x in flat[1:]),
    jax.ShapeDtypeStruct((shares, *arrays[0].shape), f32),
    jax.ShapeDtypeStruct(rows, f32),
  ]
  saved = (
    x.reshape(*rows, *x.shape[query.ndim - 1 :])
    for x in (output, top, log_total, d_output)
  )
  dq, dk, dv, d_bias, delta = _call(
    'attention_backward', expected, (*flat, *arrays, *saved), extra
  )
  dk, dv, d_bias = (x[0] if len(x) == 1 else x.sum(0) for x in (dk, dv, d_bias))
  bias = options.bias
  if isinstance(bias, ArrayBias):
    bias = bias.finish_gradient(d_bias)
  elif isinstance(bias, Relative):
    bias = bias.distance_gradient(d_bias, shape.num_query, shape.num_key)
  sinks = operands.sinks_gradient(
    options, top, log_total, delta.reshape(top.shape)
  )
  return (
    dq.reshape(query.shape),
    dk.reshape(key.shape).astype(key.dtype),
    dv.reshape(value.shape).astype(value.dtype),
    gradient_of_options(options, bias=bias, sinks=sinks),
  )


def _call(target, results, arrays, extra, **attributes):
  """Call a kernel with the options' numbers as attributes."""
  rate, stride = 0.0, 1
  if extra.dropout is not None:
    rate, stride = extra.dropout.rate, extra.dropout.stride
  call = jax.ffi.ffi_call(target, results, vmap_method='sequential')
  return call(
    *arrays,
    scale=np.float32(extra.scale),
    logit_cap=np.float32(extra.logit_cap or 0.0),
    dropout_rate=np.float64(rate),
    dropout_stride=np.int64(stride),
    **attributes,
  )


def _arrays(shape, extra):
  """The options' arrays, in the kernels' order; empty ones are absent."""
  none = jnp.zeros(0, jnp.int32)
  bias = jnp.zeros(0, jnp.float32), none
  if isinstance(extra.bias, operands.Distances):
    bias = extra.bias.array.astype(jnp.float32), _numbers(None, shape.rows)
  elif extra.bias is not None:
    bias = extra.bias.array.astype(jnp.float32), _rows(shape, extra.bias)
  mask, ids = (jnp.zeros(0, jnp.int8), none), (none, none)
  ranges = none
  by_position = []
  for condition in extra.conditions:
    if isinstance(condition, Dense):
      mask = condition.array.array, _rows(shape, condition.array)
    elif isinstance(condition, Segments):
      ids = [
        x.array.astype(jnp.int32)[_rows(shape, x)]
        for x in (condition.query_ids, condition.key_ids)
      ]
    else:
      by_position.append(condition)
  if by_position:
    ranges = _ranges(shape, by_position)
  sinks = jnp.zeros(0, jnp.float32)
  if extra.sinks is not None:
    sinks = extra.sinks.astype(jnp.float32)
  dropout = none
  if extra.dropout is not None:
    start, key_start = extra.dropout.start, extra.dropout.key_start
    key_start = jnp.zeros(1, jnp.int32) if key_start is None else key_start
    seed = jax.lax.bitcast_convert_type(extra.dropout.seed, jnp.int32)
    dropout = jnp.concatenate([seed, start, key_start])
  return *bias, *mask, ranges, *ids, sinks, dropout


def _rows(shape, per_row):
  """Which row of an array each batch row reads, [rows] int32."""
  return _numbers(batching.row_numbers(per_row.batch, shape.batch), shape.rows)


def _numbers(numbers, rows):
  return np.zeros(rows, np.int32) if numbers is None else numbers


def _ranges(shape, conditions):
  """The first and last key of each query, [rows, q, 2] int32."""
  queries = jnp.arange(shape.num_query, dtype=jnp.int32)
  low = jnp.zeros((shape.rows, shape.num_query), jnp.int32)
  high = jnp.full_like(low, shape.num_key - 1)
  for condition in conditions:
    per_query = jax.tree.map(
      lambda x: x.array[_rows(shape, x), None],
      condition,
      is_leaf=operands.is_per_row,
    )
    first, last = per_query.key_range(queries, queries)
    low = low if first is None else jnp.maximum(low, first)
    high = high if last is None else jnp.minimum(high, last)
  return jnp.stack([low, high], -1)


def _parts(shape, bias, operand):
  """(shares of rows, splits of queries) that have gradients of their own.

  With one part each, a thread computes whole rows of a head. More of them keep
  all threads busy where there are few rows and heads, for the memory of a
  further gradient each.
  """
  wanted = 2 * (os.cpu_count() or 1)
  heads, rows, sharing = shape.groups, shape.rows, 1
  may_split = True
  if bias is not None:
    sizes = operand.array.shape
    is_array = isinstance(operand, operands.PerRow)
    # Query heads of one key head are in different splits.
    heads_share = sizes[-3 if is_array else 0] == 1
    may_split = is_array and sizes[2] > 1
    may_split = may_split and not (heads_share and shape.shared > 1)
    sharing = operand.sharing if is_array else shape.rows
    rows //= sharing
    heads = 1 if heads_share else heads
  shares = min(sharing, -(-wanted // (rows * heads)))
  lines = shape.num_query * shape.shared
  splits = min(lines // _SPLIT, -(-wanted // (rows * heads * shares)))
  return shares, max(splits, 1) if may_split else 1
