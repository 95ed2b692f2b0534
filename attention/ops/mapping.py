"""A function of rows, some rows at a time, computed anew in the backward pass.

What lies between a layer's input and output then exists for a few rows only.
The loop matters: XLA on CPU begins recomputation outside of loops as soon as it
can, for all layers at once, and memory is not saved (measured).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_POSITIONS = 2048  # rows times their length at a time


def map_rows(function, shared, *arrays, axis=0, is_whole=False):
  """function(shared, *arrays), some of the arrays' rows at a time.

  Args:
    function: takes `shared` and a block of rows of every array, returns a
      pytree of arrays with as many rows; no row depends on another.
    shared: pytree of float arrays, read by all rows; their gradient is summed
      up in float32.
    *arrays: [rows, length, …]; the first is of floats. Only those of floats
      have a gradient.
    axis: where the rows are, 0 or 1, in arrays and outputs: [length, rows, …].
    is_whole: all rows at once, with nothing computed anew.

  Returns:
    What `function` returns, for all rows.
  """
  count, length = arrays[0].shape[axis], arrays[0].shape[1 - axis]
  blocks = math.ceil(count / max(1, _POSITIONS // max(1, length)))
  if blocks <= 1 or is_whole:
    return function(shared, *arrays)
  size = math.ceil(count / blocks)
  examples = [_take(x, 0, size, axis) for x in arrays]
  # The backward pass comes when Haiku's modules can't be called any more.
  function, consts = jax.closure_convert(function, shared, *examples)
  if consts:
    raise ValueError('function: expected no arrays but its arguments')
  plan = (function, axis, size, count)
  return _map_rows(plan, shared, arrays)


def _take(x, start, size, axis):
  return lax.dynamic_slice_in_dim(x, start, size, axis)


def _put(whole, block, start, axis):
  return lax.dynamic_update_slice_in_dim(whole, block, start, axis)


def _buffer(like, axis, count, probe):
  """An array to be overwritten.

  Filled with some number that is computed just before: memory for zeros, which
  wait for nothing, would be taken at the program's start.
  """
  shape = list(like.shape)
  shape[axis] = count
  return jnp.broadcast_to(probe.ravel()[0].astype(like.dtype), shape)


def _starts(plan):
  """Number of blocks, and where each begins: the last earlier, if ragged."""
  _, _, size, count = plan
  blocks = math.ceil(count / size)
  return blocks, lambda number: jnp.minimum(number * size, count - size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(plan, shared, arrays):
  function, axis, size, count = plan
  blocks, start_of = _starts(plan)
  examples = [_take(x, 0, size, axis) for x in arrays]
  shapes = jax.eval_shape(function, shared, *examples)

  def step(number, buffers):
    start = start_of(number)
    outputs = function(shared, *(_take(x, start, size, axis) for x in arrays))
    return jax.tree.map(lambda b, y: _put(b, y, start, axis), buffers, outputs)

  buffers = jax.tree.map(lambda y: _buffer(y, axis, count, arrays[0]), shapes)
  return lax.fori_loop(0, blocks, step, buffers)


def _forward(plan, shared, arrays):
  return _map_rows(plan, shared, arrays), (shared, arrays)


def _backward(plan, saved, d_outputs):
  function, axis, size, count = plan
  blocks, start_of = _starts(plan)
  shared, arrays = saved
  is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in arrays]

  def step(number, carry):
    d_arrays, d_shared = carry
    start = start_of(number)
    takes = [_take(x, start, size, axis) for x in arrays]
    floats = [x for x, f in zip(takes, is_float, strict=True) if f]

    def block(shared, *floats):
      left = iter(floats)
      mixed = (
        next(left) if f else x for x, f in zip(takes, is_float, strict=True)
      )
      return function(shared, *mixed)

    _, vjp = jax.vjp(block, shared, *floats)
    d_blocks = jax.tree.map(lambda x: _take(x, start, size, axis), d_outputs)
    if count % size:
      # Rows that the block before has done: no share in sums, kept as they are.
      fresh = start + jnp.arange(size) >= number * size
      d_blocks = jax.tree.map(lambda x: _where(fresh, x, 0, axis), d_blocks)
    d_more, *d_takes = vjp(d_blocks)
    d_shared = jax.tree.map(
      lambda total, more: total + more.astype(jnp.float32), d_shared, d_more
    )
    if count % size:
      d_takes = [
        _where(fresh, new, _take(old, start, size, axis), axis)
        for new, old in zip(d_takes, d_arrays, strict=True)
      ]
    d_arrays = [
      _put(whole, x, start, axis)
      for whole, x in zip(d_arrays, d_takes, strict=True)
    ]
    return d_arrays, d_shared

  probe = jax.tree.leaves(d_outputs)[0]
  d_arrays = [
    _buffer(x, axis, count, probe)
    for x, f in zip(arrays, is_float, strict=True)
    if f
  ]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shared)
  d_arrays, d_shared = lax.fori_loop(0, blocks, step, (d_arrays, zeros))
  d_shared = jax.tree.map(lambda d, x: d.astype(x.dtype), d_shared, shared)
  left = iter(d_arrays)
  return d_shared, tuple(next(left) if f else None for f in is_float)


def _where(rows, x, other, axis):
  rows = rows.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
  return jnp.where(rows, x, other)


_map_rows.defvjp(_forward, _backward)
