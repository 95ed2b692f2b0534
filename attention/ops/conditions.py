"""Conditions on positions: the parts of a mask, by which tiles are skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops.batching import take_block, take_rows

# Added to masked logits where a select would cost more; finite, so that fully
# masked rows are not NaN. Logits below LEAST are masked, whether because of a
# mask or of a bias.
MASKED = -1e30
LEAST = MASKED / 2


def _expand(value):
  """Append the axes of the logits to numbers per batch row: [*b, 1, 1, 1]."""
  return jnp.asarray(value)[..., None, None, None] if np.ndim(value) else value


def _length_range(length, other_first, other_length):
  """Bounds (None, high) of positions below `length`.

  The range is empty if the others, from `other_first` on, are all padding.
  """
  high = None if length is None else length - 1
  if other_length is None:
    return None, high
  high = 2**30 if high is None else high
  is_past = jnp.asarray(other_first >= other_length)
  # Arithmetic, because a select of -1 or high returns a boolean in Triton.
  return None, high - is_past.astype(jnp.int32) * (high + 1)


class Condition:
  """One part of a mask; ints and None are static, other fields are leaves."""

  trailing = 0  # axes of its arrays after the batch axes

  def __init_subclass__(cls):
    dataclasses.dataclass(frozen=True)(cls)
    jax.tree_util.register_pytree_node(cls, cls._flatten, cls._unflatten)

  def _flatten(self):
    values = [getattr(self, f.name) for f in dataclasses.fields(self)]
    is_static = [v is None or isinstance(v, int) for v in values]
    leaves = [v for v, s in zip(values, is_static, strict=True) if not s]
    static = [
      (s, v if s else None) for v, s in zip(values, is_static, strict=True)
    ]
    return leaves, tuple(static)

  @classmethod
  def _unflatten(cls, static, leaves):
    # Bypass __init__: JAX may put placeholder objects in place of leaves.
    leaves = iter(leaves)
    self = object.__new__(cls)
    for field, (is_static, value) in zip(
      dataclasses.fields(cls), static, strict=True
    ):
      value = value if is_static else next(leaves)
      object.__setattr__(self, field.name, value)
    return self

  def at(self, queries, keys):
    """Evaluate the condition at positions, integer arrays that broadcast."""
    raise NotImplementedError

  def tile(self, query, num_query, key, num_key):
    """Evaluate the condition on a block of logits; broadcastable to it."""
    return self.columns(query, num_query, key + jnp.arange(num_key))

  def columns(self, query, num_query, keys):
    """Evaluate the condition on rows of logits, at any `keys` [k]."""
    return self.at((query + jnp.arange(num_query))[:, None], keys)

  def key_range(self, first, last):
    """Return (low, high): queries first … last attend only to these keys.

    None means no bound. Bounds may be traced. Only conditions of a single batch
    row support this.
    """
    del first, last
    return None, None

  def query_range(self, first, last):
    """Return (low, high): only these queries attend to keys first … last."""
    del first, last
    return None, None

  def diagonals(self):
    """Return static bounds: keys outside query + [low, high] are masked."""
    return None, None

  def check(self, batch, num_query, num_key):
    """Raise ValueError if arrays don't fit the logits."""
    for field in dataclasses.fields(self):
      shape = np.shape(getattr(self, field.name))
      if not _is_broadcastable(shape, batch):
        raise ValueError(
          f'mask: {field.name}: expected a number or an array [*b] = {batch}, '
          f'got shape {shape}'
        )

  def rows(self, batch, start, count):
    """Return the condition of `count` rows of the flattened batch."""
    leaves, tree = jax.tree.flatten(self)
    leaves = [take_rows(x, self.trailing, batch, start, count) for x in leaves]
    return jax.tree.unflatten(tree, leaves)


class Band(Condition):
  """Allows low <= key - query <= high; None means no bound."""

  low: object
  high: object

  def at(self, queries, keys):
    distance = keys - queries
    allowed = True
    if self.low is not None:
      allowed = allowed & (distance >= _expand(self.low))
    if self.high is not None:
      allowed = allowed & (distance <= _expand(self.high))
    return jnp.ones((1, 1), bool) if allowed is True else allowed

  def key_range(self, first, last):
    return (
      None if self.low is None else first + self.low,
      None if self.high is None else last + self.high,
    )

  def query_range(self, first, last):
    return (
      None if self.high is None else first - self.high,
      None if self.low is None else last - self.low,
    )

  def diagonals(self):
    return tuple(
      b if isinstance(b, int) else None for b in (self.low, self.high)
    )


class Lengths(Condition):
  """Masks queries and keys at and past their lengths."""

  query_lengths: object
  key_lengths: object

  def at(self, queries, keys):
    allowed = True
    if self.query_lengths is not None:
      allowed = allowed & (queries < _expand(self.query_lengths))
    if self.key_lengths is not None:
      allowed = allowed & (keys < _expand(self.key_lengths))
    return jnp.ones((1, 1), bool) if allowed is True else allowed

  def key_range(self, first, last):
    return _length_range(self.key_lengths, first, self.query_lengths)

  def query_range(self, first, last):
    return _length_range(self.query_lengths, first, self.key_lengths)


class Segments(Condition):
  """Allows attention between positions with equal ids."""

  trailing = 1
  query_ids: object  # [*b, q]
  key_ids: object  # [*b, k]

  def check(self, batch, num_query, num_key):
    for field, length in (('query_ids', num_query), ('key_ids', num_key)):
      shape = getattr(self, field).shape
      if shape[-1] != length or not _is_broadcastable(shape[:-1], batch):
        raise ValueError(
          f'mask: {field}: expected shape {(*batch, length)}, got {shape}'
        )

  def tile(self, query, num_query, key, num_key):
    queries = take_block(self.query_ids, query, num_query, -1)
    keys = take_block(self.key_ids, key, num_key, -1)
    return (queries[..., :, None] == keys[..., None, :])[..., None, :, :]

  def columns(self, query, num_query, keys):
    queries = take_block(self.query_ids, query, num_query, -1)
    keys = jnp.asarray(self.key_ids)[..., keys]
    return (queries[..., :, None] == keys[..., None, :])[..., None, :, :]


class Prefix(Condition):
  """Allows all keys before the length, and the others causally."""

  lengths: object

  def at(self, queries, keys):
    return (keys <= queries) | (keys < _expand(self.lengths))

  def key_range(self, first, last):
    return None, jnp.maximum(last, self.lengths - 1)

  def query_range(self, first, last):
    return jnp.where(first < self.lengths, 0, first), None


class Placed(Condition):
  """A condition on positions start + stride · p of a shard's positions p."""

  condition: object  # without an axis of positions
  query: object  # the queries' start
  key: object
  stride: int

  def at(self, queries, keys):
    return self.condition.at(
      self.query + self.stride * queries, self.key + self.stride * keys
    )

  def key_range(self, first, last):
    return self._range(self.condition.key_range, first, last, 'query', 'key')

  def query_range(self, first, last):
    return self._range(self.condition.query_range, first, last, 'key', 'query')

  def _range(self, find, first, last, given, found):
    """Convert a range of positions to a shard's; below 0, the bounds are -1."""
    given, start = getattr(self, given), getattr(self, found)
    first, last = (given + self.stride * x for x in (first, last))
    low, high = find(first, last)
    if low is not None:
      low = self._divide(low - start + self.stride - 1)
    if high is not None:
      high = self._divide(high - start)
    return low, high

  def _divide(self, x):
    # Kernels have no floor division: shift what they truncate above 0.
    return lax.div(jnp.maximum(x, -1) + self.stride, self.stride) - 1


class Dense(Condition):
  """An array, [q, k] or of the logits' rank; size-1 axes broadcast."""

  trailing = 3
  array: object

  def check(self, batch, num_query, num_key):
    """Do nothing; the caller checks dense arrays."""

  def tile(self, query, num_query, key, num_key):
    rows = take_block(self.array, query, num_query, -2)
    return take_block(rows, key, num_key, -1)

  def columns(self, query, num_query, keys):
    rows = jnp.asarray(take_block(self.array, query, num_query, -2))
    return rows if rows.shape[-1] == 1 else rows[..., keys]


def _is_broadcastable(shape, batch):
  tail = batch[len(batch) - len(shape) :]
  return len(shape) <= len(batch) and all(
    n in (1, size) for n, size in zip(shape, tail, strict=True)
  )
