"""Key-value caches for decoding, so that each token is computed once.

A cache has buffers of constant shape, so a decoding loop compiles once and
writes into them in place. Batch rows are right-aligned: shorter rows begin with
padding, and all rows write to the same slot.

The cache of a window holds only the last positions: position p is in slot
p mod n of its n slots, which the position p + n overwrites.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import arguments
from attention.ops.biases import ArrayBias, Bias
from attention.ops.conditions import Segments
from attention.ops.masks import Mask

_AXES = -1, -2  # slot axes of a cache's key and value
_STATIC = {'static': True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """The keys and values of previous tokens in self-attention.

  A new cache has no buffers; the first keys and values determine their shapes.
  """

  capacity: int = dataclasses.field(metadata=_STATIC)  # positions
  start: object = None  # [*b] int32: positions before it are padding; or None
  length: object = 0  # [] int32: positions in use, in every row
  # In these layouts, products with few queries need no transposed buffers.
  key: object = None  # [*b, g, d, n]
  value: object = None  # [*b, g, n, e]
  window: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  spare: int = dataclasses.field(default=0, metadata={'static': True})

  @classmethod
  def create(
    cls, capacity: int, start=None, *, window: int | None = None, spare: int = 0
  ) -> 'Cache':
    """Create an empty cache.

    Args:
      capacity: number of positions, for the padded prompt and all tokens that
        follow. Overflow is not checked during decoding: without a window,
        writes past the end overwrite the last slots.
      start: [*b] ints, the number of padding tokens at the start of each row;
        None for no padding.
      window: reach of the queries, themselves included: keys further back are
        masked, and not kept. None keeps and allows all keys.
      spare: number of keys that are kept beyond a window, for `rewind`. With
        them, up to spare + 1 tokens at a time are written in place.

    Raises:
      ValueError: a number is out of range.
    """
    for name, number, least in (
      ('capacity', capacity, 1),
      ('window', window, 1),
      ('spare', spare, 0),
    ):
      if number is not None and number < least:
        raise ValueError(f'{name}: expected {least} or more, got {number}')
    start = None if start is None else jnp.asarray(start)
    return cls(capacity, start, window=window, spare=spare)

  @property
  def num_slots(self) -> int:
    """The length n of the buffers."""
    if self.window is None:
      return self.capacity
    return min(self.capacity, self.window + self.spare)

  @property
  def _is_ring(self):
    return self.num_slots < self.capacity

  def rewind(self, count) -> 'Cache':
    """Forget the last `count` tokens, an int that may be traced.

    The cache of a window has overwritten what it held further back, so `count`
    may be at most `spare`, counted from the furthest token written so far.
    """
    length = jnp.asarray(self.length - count, jnp.int32)
    return dataclasses.replace(self, length=length)

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

    Masks and biases index positions: query i is the i-th of the whole sequence.
    Mask and bias arrays cover the capacity; with the first tokens, they may
    cover only those tokens.

    Args:
      key: [*b, t, g, d], for the next t tokens.
      value: [*b, t, g, e].
      mask: see `dot_product_attention`.
      bias: see `dot_product_attention`.

    Returns:
      The extended cache, and (key, value, mask, bias) for
      `dot_product_attention`.

    Raises:
      ValueError: there are more tokens than the capacity, or arrays don't fit.
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
    for condition in mask.conditions if mask is not None else ():
      if isinstance(condition, Segments):
        is_of_first = condition.key_ids.shape[-1] == count and self.key is None
        size = count if is_of_first else self.capacity
        condition.check(batch, size, size)
    if bias is not None and not isinstance(bias, Bias):
      array = jnp.asarray(bias)
      arguments.check_float('bias', array)
      self._check('bias', array, key.shape, short='[h, q, k]')
      rank = len(batch) + 3
      bias = ArrayBias(array.reshape((1,) * (rank - array.ndim) + array.shape))
    new = jnp.moveaxis(key, -3, -1), value.swapaxes(-3, -2)
    if self.key is None:
      used, at = new, None
      buffers = self._first_buffers(new)
    elif self._is_ring and count > self.num_slots - self.window + 1:
      # The new keys overwrite some that the first of the queries reaches.
      used = tuple(
        jnp.concatenate([old, x.astype(old.dtype)], axis)
        for old, x, axis in zip((self.key, self.value), new, _AXES, strict=True)
      )
      at = self.length + jnp.arange(count)
      at = jnp.concatenate([self._held(self.length), at])
      buffers = self._write(new)
    else:
      used = buffers = self._write(new)
      at = self._held(self.length + count) if self._is_ring else None
    extended = dataclasses.replace(
      self,
      length=jnp.asarray(self.length + count, jnp.int32),
      key=buffers[0],
      value=buffers[1],
    )
    if self.key is None:
      mask, bias = self._of_first(mask, bias, count)
    else:
      mask, bias = self._of_later(mask, bias, count, at)
    key, value = jnp.moveaxis(used[0], -1, -3), used[1].swapaxes(-3, -2)
    return extended, (key, value, mask, bias)

  def _first_buffers(self, new):
    """Buffers [.., n] that hold the first tokens, or the last n of them."""
    count, size = new[0].shape[-1], self.num_slots
    buffers = []
    for x, axis in zip(new, _AXES, strict=True):
      if count > size:
        x = lax.slice_in_dim(x, count - size, count, axis=axis)
        x = jnp.roll(x, count % size, axis)
      buffers.append(_pad(x, size, axis))
    return buffers

  def _held(self, length):
    """The position in each slot [n] of a ring; negative in an empty slot."""
    slots = jnp.arange(self.num_slots)
    return length - 1 - (length - 1 - slots) % self.num_slots

  def _write(self, new):
    """Write the new keys and values into both buffers."""
    buffers, at, size = (self.key, self.value), self.length, self.num_slots
    count = new[0].shape[-1]
    if self._is_ring:
      if count > size:
        new = tuple(
          lax.slice_in_dim(x, count - size, count, axis=axis)
          for x, axis in zip(new, _AXES, strict=True)
        )
        at, count = at + count - size, size
      at = at % size
      if count > 1:
        return _scatter(buffers, new, (at + jnp.arange(count)) % size)
    return lax.platform_dependent(
      buffers, new, at, cpu=_write_in_loop, default=_write
    )

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

  def _of_first(self, mask, bias, count):
    """The mask and bias of the first tokens, at positions 0 … count - 1."""
    # The tokens start the sequence, so conditions on positions hold as is.
    if mask is not None and mask.has_positions:
      mask = Mask.dense(mask.tile(0, count, 0, count))
    further = []
    if self.start is not None:
      further.append(Mask.dense(self._is_real(jnp.arange(count))))
    if self.window is not None:
      further.append(Mask.window(left=self.window - 1))
    for condition in further:
      mask = condition if mask is None else mask & condition
    if isinstance(bias, ArrayBias):
      bias = bias.array[..., :count, :count]
    return mask, bias

  def _of_later(self, mask, bias, count, at):
    """The mask and bias of tokens that continue the sequence.

    Args:
      mask: a Mask or None.
      bias: a Bias or None.
      count: number of tokens.
      at: [k] positions of the keys; None for one key in each slot, in order.
    """
    query = self.length
    keys = jnp.arange(self.capacity) if at is None else at
    allowed = ((keys >= 0) & (keys < query + count))[None]
    if self.window is not None:
      queries = (query + jnp.arange(count))[:, None]
      allowed = allowed & (keys > queries - self.window)
    if self.start is not None:
      allowed = allowed & self._is_real(keys)
    if mask is not None and at is None:
      allowed = allowed & mask.tile(query, count, 0, self.capacity)
    elif mask is not None:
      allowed = allowed & mask.columns(query, count, at)
    if bias is not None:
      bias = bias.columns(query, count, keys)
    return Mask.dense(allowed), bias

  def _is_real(self, positions):
    """Whether positions [k] are not padding: [*b, 1, 1, k]."""
    return (positions >= self.start[..., None])[..., None, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
  """Cross-attention's keys and values of a context, computed once.

  Their layouts are those of `Cache`.
  """

  key: object = None  # [*b, g, d, k]
  value: object = None  # [*b, g, k, e]

  @classmethod
  def create(cls, key, value) -> 'CrossCache':
    """Store keys [*b, k, g, d] and values [*b, k, g, e]."""
    return cls(jnp.moveaxis(key, -3, -1), value.swapaxes(-3, -2))

  def keys_and_values(self):
    """Return keys [*b, k, g, d] and values [*b, k, g, e]."""
    return jnp.moveaxis(self.key, -1, -3), self.value.swapaxes(-3, -2)


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


def _scatter(buffers, new, slots):
  """Write the new keys and values into both buffers at `slots` [t]."""
  key, value = (
    x.astype(buffer.dtype) for x, buffer in zip(new, buffers, strict=True)
  )
  return (
    buffers[0].at[..., slots].set(key, unique_indices=True),
    buffers[1].at[..., slots, :].set(value, unique_indices=True),
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
