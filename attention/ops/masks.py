"""Masks as conditions on positions, without the [q, k] array."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops.conditions import Band, Dense, Lengths, Prefix, Segments

_FAR = 2**30  # beyond all positions


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
    return cls((Band(None, _bound('offset', offset)),))

  @classmethod
  def window(cls, left=None, right=None) -> 'Mask':
    """Allow query i the keys i - left <= j <= i + right.

    Each bound is an int, [*b] integers, or None for no bound.
    """
    left, right = _bound('left', left), _bound('right', right)
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
      if not jnp.issubdtype(_array(ids).dtype, jnp.integer):
        raise ValueError(
          f'{name}: expected integers, got dtype {_array(ids).dtype}'
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
    if array.dtype.kind in 'OU':
      raise ValueError(
        f'mask: expected a Mask or a boolean array, got {array.tolist()!r:.80}'
      )
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

  def __and__(self, other) -> 'Mask':
    """Join with another mask, or with a boolean array, see `dense`."""
    if not isinstance(other, Mask):
      other = Mask.dense(other)
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


def _bound(name, value):
  """A distance, so bounded that adding a position does not overflow int32."""
  value = _int_or_array(name, value)
  if value is None:
    return None
  if isinstance(value, int):
    return max(-_FAR, min(value, _FAR))
  return value.clip(-_FAR, _FAR)


def _array(value):
  return value if isinstance(value, jax.Array) else np.asarray(value)
