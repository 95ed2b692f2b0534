"""What a program on a GPU reads and stores, and the blocks that masks leave."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

from attention.ops.implementations.fused.operands import (
  is_per_row,
  whole_conditions,
)
from attention.ops.implementations.fused.tile import Tile, both
from attention.ops.masks import Dense, Segments


def _load(place, mask, other=0):
  if mask is None:
    return triton.load(place)
  return triton.load(place, mask=mask, other=other)


def _place(ref, row, positions, head, block):
  """A block of [rows, length, heads, c], channels filled up to a power of 2."""
  length, size = ref.shape[1], ref.shape[3]
  channels = jnp.arange(max(16, 2 ** math.ceil(math.log2(size))))[None]
  mask = both(
    None if length % block == 0 else positions[:, None] < length,
    None if channels.shape[1] == size else channels < size,
  )
  return ref.at[row, positions[:, None], head, channels], mask


def load(ref, row, positions, head, block):
  """[block, channels] of [rows, length, heads, c], zeros beyond its ends."""
  return _load(*_place(ref, row, positions, head, block))


def store(ref, value, row, positions, head, block):
  """The inverse of `load`."""
  place, mask = _place(ref, row, positions, head, block)
  triton.store(place, value.astype(ref.dtype), mask=mask)


def load_numbers(ref, row, positions, head, block, other):
  """[block] of [rows, length, heads]."""
  mask = None if ref.shape[1] % block == 0 else positions < ref.shape[1]
  return _load(ref.at[row, positions, head], mask, other)


def _at_row(condition, row):
  """The condition of one row: its numbers."""
  return jax.tree.map(lambda x: x.at(row)[...], condition, is_leaf=is_per_row)


class GpuTile(Tile):
  """A tile whose arrays are loaded entry by entry."""

  def distances(self, bias):
    shape = self.shape
    distance = self.keys - self.queries + (shape.num_query - 1)
    most = shape.num_query + shape.num_key - 1
    head = self.head if bias.array.shape[0] > 1 else 0
    mask = self._inside(True, True)
    distance = jnp.clip(distance, 0, most - 1)
    return _load(bias.array.at[head, distance], mask)

  def entries(self, array):
    *_, num_query, num_key = array.array.shape
    place = array.at(self.row, self.head, self.queries, self.keys)
    if num_query == 1 and num_key == 1:
      return place[...]
    return _load(place, self._inside(num_query > 1, num_key > 1))

  def ids(self, condition):
    of_queries = condition.query_ids.at(self.row, self.queries)
    of_keys = condition.key_ids.at(self.row, self.keys)
    return (
      _load(of_queries, self._inside(True, False)),
      _load(of_keys, self._inside(False, True)),
    )

  def numbers(self, condition):
    return _at_row(condition, self.row)

  def _inside(self, of_queries, of_keys):
    """Which positions exist; None if all blocks are full."""
    mask = None
    if of_queries and self.shape.num_query % self.queries.size:
      mask = self.queries < self.shape.num_query
    if of_keys and self.shape.num_key % self.keys.size:
      mask = both(mask, self.keys < self.shape.num_key)
    return mask


def key_spans(shape, options, limits, blocks, row, head, block):
  """Spans (first, last, is_whole) of the keys' blocks that queries meet."""
  first = block * blocks.queries
  last = jnp.minimum(first + blocks.queries, shape.num_query) - 1
  cut = blocks.keys, shape.num_key
  ranges = [c.key_range for c in _conditions(options, row)]
  return _spans(options, ranges, limits, cut, (row, head, block), first, last)


def query_spans(shape, options, limits, blocks, row, head, block):
  """The same of the queries' blocks that keys meet."""
  first = block * blocks.keys
  last = jnp.minimum(first + blocks.keys, shape.num_key) - 1
  cut = blocks.queries, shape.num_query
  ranges = [c.query_range for c in _conditions(options, row)]
  spans = _spans(options, ranges, limits, cut, (row, head, block), first, last)
  if shape.num_key % blocks.keys:  # the last block of keys is not full
    spans = [(first, last, False) for first, last, _ in spans]
  return spans


def _conditions(options, row):
  return [
    _at_row(c, row)
    for c in options.conditions
    if not isinstance(c, Segments | Dense)
  ]


def _spans(options, ranges, limits, cut, place, first, last):
  size, length = cut
  count = -(-length // size)
  low, high = _range(ranges, first, last, length)
  begin, end = lax.div(jnp.maximum(low, 0), size), count
  if high is not None:
    end = jnp.minimum(end, lax.div(jnp.maximum(high + size, 0), size))
  row, head, block = place
  for limit in limits:
    pair = [
      limit.array.at[
        limit.number(row),
        head if limit.array.shape[1] > 1 else 0,
        block if limit.array.shape[2] > 1 else 0,
        i,
      ][...]
      for i in (0, 1)
    ]
    begin = jnp.maximum(begin, pair[0])
    end = jnp.minimum(end, pair[1] + 1)
  if not whole_conditions(options):
    return [(begin, end, False)]
  full = length // size
  # Seen by all of first … last: between what the last and the first begin.
  least, most = _range(ranges, last, first, length)
  whole = begin
  if options.conditions:
    whole = lax.div(jnp.maximum(least, 0) + size - 1, size)
    whole = jnp.clip(whole, begin, jnp.maximum(begin, end))
    if most is not None:
      full = jnp.minimum(full, lax.div(jnp.maximum(most + 1, 0), size))
  rest = jnp.maximum(whole, jnp.minimum(full, end))
  spans = [(whole, rest, True)]
  if options.conditions:
    spans.insert(0, (begin, whole, False))
  if options.conditions or length % size:
    spans.append((rest, end, False))
  return spans


def _range(ranges, first, last, length):
  """(low, high) that all conditions leave; high None: no bound."""
  low, high = 0, None
  for of in ranges:
    more_low, more_high = of(first, last)
    if more_low is not None:
      low = jnp.maximum(low, more_low)
    if more_high is not None:
      high = more_high if high is None else jnp.minimum(high, more_high)
  return low, high
