"""Masks as conditions on positions, without the [q, k] array."""

import dataclasses
import math

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


def _int_or_array(name, value):
  """Keep Python ints static; convert anything else to an int32 array."""
  if value is None or isinstance(value, (int, np.integer)):
    return value if value is None else int(value)
  array = value if isinstance(value, jax.Array) else np.asarray(value)
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ValueError(
      f'{name}: expected an int or an integer array [*b], got dtype '
      f'{array.dtype}'
    )
  return array.astype(np.int32)  # signed, so that it can be negated


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys each query may attend to: conditions combined by AND.

  A mask is a pytree that supports `jit` and `vmap`. Its Python ints are static
  and let implementations skip whole blocks of the logits; its arrays are
  leaves. Create masks with the class methods and combine them with `&`. In
  boolean arrays, True = may attend.
  """

  conditions: tuple

  @classmethod
  def causal(cls, offset=0) -> 'Mask':
    """Allow query i the keys j <= i + offset, an int or [*b] integers."""
    return cls((Band(None, _int_or_array('offset', offset)),))

  @classmethod
  def window(cls, left=None, right=None) -> 'Mask':
    """Allow query i the keys i - left <= j <= i + right.

    Each bound is an int, [*b] integers, or None for no bound.
    """
    left, right = _int_or_array('left', left), _int_or_array('right', right)
    return cls((Band(None if left is None else -left, right),))

  @classmethod
  def lengths(cls, query_lengths=None, key_lengths=None) -> 'Mask':
    """Mask positions at and past the lengths, an int or [*b] integers each."""
    return cls(
      (
        Lengths(
          _int_or_array('query_lengths', query_lengths),
          _int_or_array('key_lengths', key_lengths),
        ),
      )
    )

  @classmethod
  def segments(cls, query_ids, key_ids=None) -> 'Mask':
    """Allow attention between positions of equal id, [*b, q] and [*b, k].

    The keys' ids are by default those of the queries.
    """
    key_ids = query_ids if key_ids is None else key_ids
    for name, ids in (('query_ids', query_ids), ('key_ids', key_ids)):
      if np.ndim(ids) == 0:
        raise ValueError(
          f'{name}: expected an array [*b, positions], got {ids}'
        )
    return cls((Segments(_array(query_ids), _array(key_ids)),))

  @classmethod
  def prefix(cls, lengths) -> 'Mask':
    """Allow all keys before `lengths` (int or [*b]), and others causally."""
    return cls((Prefix(_int_or_array('lengths', lengths)),))

  @classmethod
  def dense(cls, array) -> 'Mask':
    """Wrap a boolean array [q, k], or broadcastable to logits [*b, h, q, k].

    Raises:
      ValueError: the array isn't boolean (numbers that are added to the logits
        are a bias), or has fewer than two axes.
    """
    array = _array(array)
    if array.dtype != bool:
      raise ValueError(
        f'mask: expected a boolean array (True = may attend), got {array.dtype}'
        '; pass numbers to add to the logits as bias='
      )
    if array.ndim < 2:
      raise ValueError(
        f'mask: expected an array [q, k] or [*b, h, q, k], got {array.shape}'
      )
    return cls((Dense(array),))

  def __and__(self, other: 'Mask') -> 'Mask':
    if not isinstance(other, Mask):
      return NotImplemented
    return Mask(self.conditions + other.conditions)

  def to_array(self, num_query: int, num_key: int) -> jax.Array:
    """Return the mask as a boolean array, broadcastable to [*b, h, q, k]."""
    return self.tile(0, num_query, 0, num_key)

  def tile(self, query, num_query: int, key, num_key: int) -> jax.Array:
    """Return the block of `num_query` × `num_key` from (`query`, `key`) on.

    The starts may be traced; the result broadcasts to [*b, h, q, k].
    """
    allowed = jnp.ones((1, 1), bool)
    for condition in self.conditions:
      allowed = allowed & condition.tile(query, num_query, key, num_key)
    return allowed

  def columns(self, query, num_query: int, keys) -> jax.Array:
    """Return the rows of `num_query` queries from `query` on, at some keys.

    Args:
      query: first query; may be traced.
      num_query: number of queries.
      keys: [k] ints, the keys' positions; may be traced.

    Returns:
      Booleans, broadcastable to [*b, h, num_query, k].
    """
    allowed = jnp.ones((1, 1), bool)
    for condition in self.conditions:
      allowed = allowed & condition.columns(query, num_query, keys)
    return allowed

  def rows(self, batch: tuple, start, count: int) -> 'Mask':
    """Return the mask of some rows of the flattened batch: one batch axis.

    Args:
      batch: shape of the whole batch, *b.
      start: first row; may be traced.
      count: number of rows.
    """
    return Mask(tuple(c.rows(batch, start, count) for c in self.conditions))

  def diagonals(self) -> tuple[int | None, int | None]:
    """Return static bounds: keys outside query + [low, high] are masked."""
    lows, highs = zip(
      (None, None), *(c.diagonals() for c in self.conditions), strict=True
    )
    return (
      max((low for low in lows if low is not None), default=None),
      min((high for high in highs if high is not None), default=None),
    )

  @property
  def is_band(self) -> bool:
    """Whether the static diagonals describe the mask completely."""
    return all(
      isinstance(c, Band)
      and isinstance(c.low, int | None)
      and isinstance(c.high, int | None)
      for c in self.conditions
    )

  def check(self, batch: tuple, num_query: int, num_key: int) -> None:
    """Check that the mask fits this batch and these numbers of positions.

    The caller checks dense arrays.

    Raises:
      ValueError: lengths, offsets or ids have another shape.
    """
    for condition in self.conditions:
      condition.check(batch, num_query, num_key)

  @property
  def has_positions(self) -> bool:
    """Whether any array has an axis of positions, which fixes their number."""
    return any(c.trailing for c in self.conditions)

  @property
  def numbers(self) -> int:
    """Total size of the arrays without an axis of positions."""
    return sum(
      math.prod(np.shape(x))
      for c in self.conditions
      if not c.trailing
      for x in jax.tree.leaves(c)
    )

  def arrays(self):
    """Return the dense arrays, whose shapes the caller checks."""
    return [c.array for c in self.conditions if isinstance(c, Dense)]

  def tree_flatten(self):
    return self.conditions, None

  @classmethod
  def tree_unflatten(cls, _, conditions):
    return cls(tuple(conditions))


def _is_broadcastable(shape, batch):
  tail = batch[len(batch) - len(shape) :]
  return len(shape) <= len(batch) and all(
    n in (1, size) for n, size in zip(shape, tail, strict=True)
  )


def _array(value):
  return value if isinstance(value, jax.Array) else np.asarray(value)
