"""Indexing of a flattened batch, for arrays that broadcast over parts of it."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax


def flatten(array, trailing: int):
  """Flatten the batch axes [*b, …] → [rows, …], keeping `trailing` axes."""
  if array.ndim < trailing:  # e.g. a [q, k] mask, shared by rows and heads
    return array.reshape((1,) * (trailing - array.ndim + 1) + array.shape)
  lead = array.ndim - trailing
  return array.reshape(math.prod(array.shape[:lead]), *array.shape[lead:])


def row_numbers(shape: tuple, batch: tuple) -> np.ndarray | None:
  """Map each row of `batch` to the row it reads in an array of shape `shape`.

  Args:
    shape: the array's batch shape, which broadcasts to `batch`.
    batch: shape of the whole batch.

  Returns:
    None if all batch rows read the same row, else integers [rows of batch].
  """
  count = math.prod(shape)
  if count == 1:
    return None
  shape = (1,) * (len(batch) - len(shape)) + tuple(shape)
  numbers = np.arange(count, dtype=np.int32).reshape(shape)
  return np.broadcast_to(numbers, batch).ravel()


def take_rows(array, trailing: int, batch: tuple, start, count: int):
  """Take `count` rows of the flattened batch from `start` on: [count or 1, …].

  Args:
    array: [*b', …] whose leading axes broadcast to `batch`.
    trailing: number of axes after the batch axes.
    batch: shape of the whole batch.
    start: first row; may be traced.
    count: number of rows.
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
  """Take a block along an axis; an axis of size 1 is kept, to broadcast."""
  if array.shape[axis] == 1 or (
    isinstance(start, int) and start == 0 and size == array.shape[axis]
  ):
    return array
  return lax.dynamic_slice_in_dim(array, start, size, axis)


def put_block(whole, block, start):
  """Write `block` into `whole` at `start`, its indices on the leading axes."""
  if whole.shape == block.shape:
    return block
  return lax.dynamic_update_slice(whole, block, _starts(start, whole.ndim))


def add_block(whole, block, start):
  """Add `block` to `whole` at `start`, its indices on the leading axes."""
  if whole.shape == block.shape:
    return whole + block
  old = lax.dynamic_slice(whole, _starts(start, whole.ndim), block.shape)
  return put_block(whole, old + block, start)


def _starts(start, ndim):
  """Convert start indices to int32, with 0 for the remaining axes."""
  start = (*start, *(0,) * (ndim - len(start)))
  return [jnp.asarray(i, jnp.int32) for i in start]
