"""Key-value caches for decoding, so that each token is computed once.

A cache has buffers of constant shape, so a decoding loop compiles once and
writes into them in place. Batch rows are right-aligned: shorter rows begin with
padding, and all rows write to the same slot.
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

_AXES = -1, -2  # slot axes of a cache's key and value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The keys and values of previous tokens in self-attention.

  A new cache has no buffers; the first keys and values determine their shapes.
  """

  capacity: int = dataclasses.field(metadata={'static': True})  # slots, n
  start: object = None  # [*b] int32: slots before it are padding; or None
  length: object = 0  # [] int32: slots in use, in every row
  # In these layouts, products with few queries need no transposed buffers.
  key: object = None  # [*b, g, d, n]
  value: object = None  # [*b, g, n, e]

  @classmethod
  def create(cls, capacity: int, start=None) -> 'Cache':
    """Create an empty cache.

    Args:
      capacity: number of slots, for the padded prompt and all tokens that
        follow. Overflow is not checked during decoding: writes past the end
        overwrite the last slots.
      start: [*b] ints, the number of padding tokens at the start of each row;
        None for no padding.

    Raises:
      ValueError: the capacity is below 1.
    """
    if capacity < 1:
      raise ValueError(f'capacity: expected 1 or more, got {capacity}')
    return cls(capacity, None if start is None else jnp.asarray(start))

  def positions(self, count: int) -> jax.Array:
    """Return the next `count` tokens' positions: [count] or [*b, count].

    Positions count from 0 at the first token after the padding.
    """
    slots = self.length + jnp.arange(count)
    if self.start is None:
      return slots
    return jnp.maximum(slots - self.start[..., None], 0)

  def extend(self, key, value, mask=None, bias=None):
    """Append keys and values, and return the arguments of their attention.

    Masks and biases index slots: query i is the i-th of the whole sequence.
    Mask and bias arrays cover all slots; with the first tokens, they may cover
    only those tokens.

    Args:
      key: [*b, t, g, d], for the next t tokens.
      value: [*b, t, g, e].
      mask: see `dot_product_attention`.
      bias: see `dot_product_attention`.

    Returns:
      The extended cache, and (key, value, mask, bias) for
      `dot_product_attention`.

    Raises:
      ValueError: there are more tokens than slots, or arrays don't fit.
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
        cpu=_write_in_loop,
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
      heads = got[-3]  # attention checks it against the query's heads
    shape = (*batch, heads, size, size)
    arguments.check_broadcast(name, got, shape, short)

  def _mask(self, mask, num_query, num_key):
    slots = jnp.arange(num_key)
    allowed = None
    if self.start is not None:
      allowed = (slots >= self.start[..., None])[..., None, None, :]
    if self.key is None:
      # The tokens start the sequence, so conditions on positions hold as is.
      if mask is not None and mask.has_positions:
        mask = Mask.dense(mask.tile(0, num_query, 0, num_key))
      if allowed is None:
        return mask
      return Mask.dense(allowed) if mask is None else mask & Mask.dense(allowed)
    is_used = (slots < self.length + num_query)[None]
    allowed = is_used if allowed is None else allowed & is_used
    if mask is not None:
      allowed = allowed & mask.tile(self.length, num_query, 0, num_key)
    return Mask.dense(allowed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
  """Cross-attention's keys and values of a context, computed once."""

  key: object = None  # [*b, k, g, d]
  value: object = None  # [*b, k, g, e]


def align(sequences, length: int | None = None):
  """Right-align prompts of different lengths in one batch.

  Args:
    sequences: sequences of token ids, each with at least one token.
    length: length of the batch rows; by default that of the longest sequence.

  Returns:
    tokens [b, length] int32, each row left-padded with copies of its first
    token; start [b] int32, the index of the first token.

  Raises:
    ValueError: a sequence is empty or too long.
  """
  lengths = np.array([len(s) for s in sequences], np.int32)
  length = max(lengths, default=1) if length is None else length
  for row, n in enumerate(lengths):
    if not 1 <= n <= length:
      raise ValueError(
        f'sequences: expected 1 to {length} tokens each, got {n} in row {row}'
      )
  rows = [
    np.pad(np.asarray(s, np.int32), (length - n, 0), mode='edge')
    for s, n in zip(sequences, lengths, strict=True)
  ]
  return np.stack(rows), length - lengths


def _write(buffers, new, at):
  """Write the new keys and values into both buffers from slot `at` on."""
  return tuple(
    lax.dynamic_update_slice_in_dim(buffer, x.astype(buffer.dtype), at, axis)
    for buffer, x, axis in zip(buffers, new, _AXES, strict=True)
  )


def _write_in_loop(buffers, new, at):
  """Run `_write` in a loop of one iteration.

  For a batch of one, XLA on CPU would otherwise fuse the update into every
  kernel that reads a buffer, and copy the buffer for each. It does not optimise
  loops with an unknown number of iterations this way.
  """
  count = jnp.where(at >= 0, 1, 0)
  return lax.fori_loop(0, count, lambda _, x: _write(x, new, at), buffers)


def _pad(x, length, axis):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, length - x.shape[axis])
  return jnp.pad(x, padding)


def _bias_tile(bias, batch, query, num_query, num_key):
  """Return a bias's rows from `query` on, with the rank of the logits."""
  tile = bias.tile(batch, 0, math.prod(batch), query, num_query, 0, num_key)
  lead = batch if tile.shape[0] > 1 else (1,) * len(batch)
  return tile.reshape(*lead, *tile.shape[1:])
