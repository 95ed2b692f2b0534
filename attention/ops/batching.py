"""Rows of a flattened batch, out of arrays that broadcast over some of it."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax


def flatten(array, trailing: int):
  """[*b, …] with `trailing` axes behind the batch → [rows, …]."""
  if array.ndim < trailing:  # a [q, k] mask stands for [1, q, k]
    return array.reshape((1,) * (trailing - array.ndim + 1) + array.shape)
  lead = array.ndim - trailing
  return array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:])


def row_numbers(shape: tuple, batch: tuple) -> np.ndarray | None:
  """Which row of an array of batch shape `shape` each row of `batch` reads.

  Returns:
    None if all rows read the same one, else integers [rows of batch].
  """
  count = math.prod(shape)
  if count == 1:
    return None
  shape = (1,) * (len(batch) - len(shape)) + tuple(shape)
  numbers = np.arange(count, dtype=np.int32).reshape(shape)
  return np.broadcast_to(numbers, batch).ravel()


def take_rows(array, trailing: int, batch: tuple, start, count: int):
  """Rows start … start + count of the batch, [count or 1, …].

  Args:
    array: [*b', …] whose leading axes broadcast to `batch`.
    trailing: axes behind the batch.
    batch: the whole batch's shape.
    start: first row; may be traced.
    count: how many rows.
  """
  array = jnp.asarray(array)
  lead = max(array.ndim - trailing, 0)
  numbers = row_numbers(array.shape[:lead], batch)
  flat = flatten(array, trailing)
  if numbers is None:
    return flat
  if len(flat) == len(numbers):
    return lax.dynamic_slice_in_dim(flat, start, count)
  return flat[lax.dynamic_slice_in_dim(jnp.asarray(numbers), start, count)]


def take_block(array, start, size: int, axis: int):
  """A block of an axis; an axis of one position stands for all of them."""
  if array.shape[axis] == 1 or (
    isinstance(start, int) and start == 0 and size == array.shape[axis]
  ):
    return array
  return lax.dynamic_slice_in_dim(array, start, size, axis)


def put_block(whole, block, start):
  """`whole` with `block` in it from `start` on, indices of the first axes."""
  if whole.shape == block.shape:
    return block
  return lax.dynamic_update_slice(whole, block, _starts(start, whole.ndim))


def add_block(whole, block, start):
  """`whole` with `block` added from `start` on, indices of the first axes."""
  if whole.shape == block.shape:
    return whole + block
  old = lax.dynamic_slice(whole, _starts(start, whole.ndim), block.shape)
  return put_block(whole, old + block, start)


def _starts(start, ndim):
  """Starts of mixed kinds, all as int32; of axes not named, 0."""
  start = (*start, *(0,) * (ndim - len(start)))
  return [jnp.asarray(i, jnp.int32) for i in start]
