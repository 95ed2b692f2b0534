"""Keys and values remembered, so that each token is computed once.

A cache has buffers of constant shape, so that a loop over tokens compiles once
and writes into them in place. Rows of a batch are aligned at their ends: those
with less to remember begin with padding, and all write to the same slot.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import arguments
from attention.ops.biases import ArrayBias, Bias
from attention.ops.masks import Mask

_AXES = -1, -2  # of the slots, in a cache's key and value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What self-attention has seen so far.

  It begins without buffers; the first keys and values tell their shapes.
  """

  capacity: int = dataclasses.field(metadata={'static': True})  # slots, n
  start: object = None  # [*b] int32: slots before it are padding; None: none
  length: object = 0  # [] int32: slots in use, of every row
  # As the products of few queries want them: none has to transpose a buffer.
  key: object = None  # [*b, g, d, n]
  value: object = None  # [*b, g, n, e]

  @classmethod
  def create(cls, capacity: int, start=None) -> 'Cache':
    """An empty one.

    Args:
      capacity: slots; a prompt with its padding, and all tokens that are fed
        after it, must not be more. Not checked while tokens come: what is
        written past the end overwrites the last slots.
      start: [*b] ints, how much padding each row begins with; None for none.

    Raises:
      ValueError: a capacity below 1.
    """
    if capacity < 1:
      raise ValueError(f'capacity: expected 1 or more, got {capacity}')
    return cls(capacity, None if start is None else jnp.asarray(start))

  def positions(self, count: int) -> jax.Array:
    """Where the next `count` tokens stand, [count] or [*b, count]; from 0."""
    slots = self.length + jnp.arange(count)
    if self.start is None:
      return slots
    return jnp.maximum(slots - self.start[..., None], 0)

  def extend(self, key, value, mask=None, bias=None):
    """Remembers more, and says what the queries beside it attend to.

    Masks and biases speak of slots: query i is the i-th of the whole sequence.
    Arrays are of all slots; beside the first tokens, of those tokens alone if
    need be.

    Args:
      key: [*b, t, g, d] of the next t tokens.
      value: [*b, t, g, e].
      mask: see `dot_product_attention`.
      bias: likewise.

    Returns:
      The cache after them, and (key, value, mask, bias) for
      `dot_product_attention`.

    Raises:
      ValueError: more tokens than slots, or arrays that don't fit.
    """
    count, batch = key.shape[-3], key.shape[:-3]
    if count > self.capacity:
      raise ValueError(
        f'cache: expected at most capacity={self.capacity} tokens, got {count}'
      )
    if mask is not None and not isinstance(mask, Mask):
      mask = Mask.dense(mask)
    for array in mask.arrays() if mask is not None else ():
      self._check('mask', array, key.shape, short='[q, k]')
    if bias is not None and not isinstance(bias, Bias):
      array = jnp.asarray(bias)
      arguments.check_float('bias', array)
      self._check('bias', array, key.shape, short='[h, q, k]')
      rank = len(batch) + 3
      bias = ArrayBias(array.reshape((1,) * (rank - array.ndim) + array.shape))
    new = jnp.moveaxis(key, -3, -1), value.swapaxes(-3, -2)
    if self.key is None:
      used = new
      buffers = [
        _pad(x, self.capacity, axis) for x, axis in zip(new, _AXES, strict=True)
      ]
    else:
      used = buffers = lax.platform_dependent(
        (self.key, self.value),
        new,
        self.length,
        cpu=_write_apart,
        default=_write,
      )
    extended = dataclasses.replace(
      self,
      length=jnp.asarray(self.length + count, jnp.int32),
      key=buffers[0],
      value=buffers[1],
    )
    mask = self._mask(mask, count, used[0].shape[-1])
    if bias is not None and self.key is not None:
      bias = _bias_tile(bias, batch, self.length, count, self.capacity)
    elif isinstance(bias, ArrayBias):
      bias = bias.array[..., :count, :count]
    key, value = jnp.moveaxis(used[0], -1, -3), used[1].swapaxes(-3, -2)
    return extended, (key, value, mask, bias)

  def _check(self, name, array, key, short):
    *batch, count, heads, _ = key
    got = array.shape
    size = self.capacity
    if self.key is None and max(got[-2:], default=1) == count:
      size = count
    if len(got) > 2:
      heads = got[-3]  # for attention to check, which knows the queries'
    shape = (*batch, heads, size, size)
    arguments.check_broadcast(name, got, shape, short)

  def _mask(self, mask, num_query, num_key):
    slots = jnp.arange(num_key)
    seen = None
    if self.start is not None:
      seen = (slots >= self.start[..., None])[..., None, None, :]
    if self.key is None:
      # The whole sequence so far: descriptions hold as they are.
      if mask is not None and mask.has_positions:
        mask = Mask.dense(mask.tile(0, num_query, 0, num_key))
      if seen is None:
        return mask
      return Mask.dense(seen) if mask is None else mask & Mask.dense(seen)
    is_used = (slots < self.length + num_query)[None]
    seen = is_used if seen is None else seen & is_used
    if mask is not None:
      seen = seen & mask.tile(self.length, num_query, 0, num_key)
    return Mask.dense(seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
  """Keys and values of a context, computed once."""

  key: object = None  # [*b, k, g, d]
  value: object = None  # [*b, k, g, e]


def align(sequences, length: int | None = None):
  """A batch of prompts of different lengths, aligned at their ends.

  Args:
    sequences: of token ids, each with at least one.
    length: of the batch's rows; the longest sequence's by default.

  Returns:
    tokens [b, length] int32, each row padded before its first token with copies
    of that; start [b] int32, where the first token is.

  Raises:
    ValueError: an empty sequence, or one that is too long.
  """
  lengths = np.array([len(s) for s in sequences], np.int32)
  length = max(lengths, default=1) if length is None else length
  for row, n in enumerate(lengths):
    if not 1 <= n <= length:
      raise ValueError(
        f'sequences: expected 1 to {length} tokens in each, got {n} in {row}'
      )
  rows = [
    np.pad(np.asarray(s, np.int32), (length - n, 0), mode='edge')
    for s, n in zip(sequences, lengths, strict=True)
  ]
  return np.stack(rows), length - lengths


def _write(buffers, new, at):
  """Both buffers with the new keys and values in the slots from `at` on."""
  return tuple(
    lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), at, axis)
    for buffer, x, axis in zip(buffers, new, _AXES, strict=True)
  )


def _write_apart(buffers, new, at):
  """`_write` as a loop of one turn.

  For a batch of one XLA on CPU would put the update into every kernel that
  reads a buffer, and copy the buffer for each. It leaves loops alone that it
  can't count.
  """
  turns = jnp.where(at >= 0, 1, 0)
  return lax.fori_loop(0, turns, lambda _, x: _write(x, new, at), buffers)


def _pad(x, length, axis):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, padding)


def _bias_tile(bias, batch, query, num_query, num_key):
  """Rows of a bias from a query on, of the logits' rank."""
  tile = bias.tile(batch, 0, math.prod(batch), query, num_query, 0, num_key)
  lead = batch if tile.shape[0] > 1 else (1,) * len(batch)
  return tile.reshape(*lead, *tile.shape[1:])
