"""Loads and stores of GPU kernels, and the blocks that masks leave."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

from attention.ops.conditions import Dense, Segments
from attention.ops.implementations.fused.gpu_launch import next_power
from attention.ops.implementations.fused.operands import is_per_row
from attention.ops.implementations.fused.tile import Tile, combine


def _load(place, mask, other=0):
  if mask is None:
    return triton.load(place)
  return triton.load(place, mask=mask, other=other)


def _place(ref, row, positions, head, block):
  """A block of [rows, length, heads, c], channels padded to a power of two."""
  length, size = ref.shape[1], ref.shape[3]
  channels = jnp.arange(next_power(size))[None]
  mask = combine(
    None if length % block == 0 else positions[:, None] < length,
    None if channels.shape[1] == size else channels < size,
  )
  return ref.at[row, positions[:, None], head, channels], mask


def load(ref, row, positions, head, block):
  """Load [block, channels] of [rows, length, heads, c], padded with zeros."""
  return _load(*_place(ref, row, positions, head, block))


def store(ref, value, row, positions, head, block):
  """Store a block, as the inverse of `load`."""
  place, mask = _place(ref, row, positions, head, block)
  triton.store(place, value.astype(ref.dtype), mask=mask)


def load_scalars(ref, row, positions, head, block, other):
  """Load [block] of [rows, heads, length], padded with `other`."""
  mask = None if ref.shape[2] % block == 0 else positions < ref.shape[2]
  return _load(ref.at[row, head, positions], mask, other)


def _instruction(asm, *args):
  """Apply a machine instruction to float32 arrays of one shape."""
  args = [jnp.asarray(x, jnp.float32) for x in args]
  (result,) = triton.elementwise_inline_asm(
    asm,
    args=args,
    constraints='=f' + ',f' * len(args),
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
  )
  return result


def _at_row(condition, row):
  """The condition for one batch row, its arrays loaded as scalars."""
  return jax.tree.map(lambda x: x.at(row)[...], condition, is_leaf=is_per_row)


@dataclasses.dataclass(frozen=True)
class GpuTile(Tile):
  """A tile that loads its entries of bias and mask arrays.

  It uses machine instructions where Triton would not: XLA forbids it to fuse a
  product and a sum, and its base-2 exponential spends three more instructions
  on denormal results.
  """

  interpret: bool = False  # without machine instructions

  def multiply_add(self, x, y, z):
    if self.interpret:
      return super().multiply_add(x, y, z)
    y, z = (jnp.broadcast_to(a, x.shape) for a in (y, z))
    return _instruction('fma.rn.f32 $0, $1, $2, $3;', x, y, z)

  def exp2(self, x):
    if self.interpret:
      return jnp.exp2(x)
    return _instruction('ex2.approx.ftz.f32 $0, $1;', x)

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
    queries, keys = self.queries, self.keys
    is_transposed = keys.shape[1] == 1 and num_query > 1 and num_key > 1
    mask = self._inside(num_query > 1, num_key > 1)
    if is_transposed:  # read whole cache lines, along keys
      queries, keys = queries.T, keys.T
      mask = None if mask is None else mask.T
    place = array.at(self.row, self.head, queries, keys)
    if num_query == 1 and num_key == 1:
      return place[...]
    entries = _load(place, mask)
    return entries.T if is_transposed else entries

  def ids(self, condition):
    of_queries = condition.query_ids.at(self.row, self.queries)
    of_keys = condition.key_ids.at(self.row, self.keys)
    return (
      _load(of_queries, self._inside(True, False)),
      _load(of_keys, self._inside(False, True)),
    )

  def scalars(self, condition):
    return _at_row(condition, self.row)

  def _inside(self, of_queries, of_keys):
    """Which positions are not padding; None if no block has padding."""
    mask = None
    if of_queries and self.shape.num_query % self.queries.size:
      mask = self.queries < self.shape.num_query
    if of_keys and self.shape.num_key % self.keys.size:
      mask = combine(mask, self.keys < self.shape.num_key)
    return mask


def key_spans(shape, options, limits, blocks, row, head, block):
  """Spans (first, last, is_whole) of key blocks that a query block needs."""
  first = block * blocks.queries
  last = jnp.minimum(first + blocks.queries, shape.num_query) - 1
  size_and_length = blocks.keys, shape.num_key
  ranges = [c.key_range for c in _conditions(options, row)]
  place = row, head, block
  return _spans(options, ranges, limits, size_and_length, place, first, last)


def query_spans(shape, options, limits, blocks, row, head, block):
  """Spans (first, last, is_whole) of query blocks that a key block needs."""
  first = block * blocks.keys
  last = jnp.minimum(first + blocks.keys, shape.num_key) - 1
  size_and_length = blocks.queries, shape.num_query
  ranges = [c.query_range for c in _conditions(options, row)]
  place = row, head, block
  spans = _spans(options, ranges, limits, size_and_length, place, first, last)
  if shape.num_key % blocks.keys:  # the last key block has padding
    spans = [(first, last, False) for first, last, _ in spans]
  return spans


def _conditions(options, row):
  return [
    _at_row(c, row)
    for c in options.conditions
    if not isinstance(c, Segments | Dense)
  ]


def _spans(options, ranges, limits, size_and_length, place, first, last):
  size, length = size_and_length
  count = -(-length // size)
  low, high = _range(ranges, first, last, length)
  begin, end = lax.div(jnp.maximum(low, 0), size), count
  if high is not None:
    end = jnp.minimum(end, lax.div(jnp.maximum(high + size, 0), size))
  row, head, block = place
  for limit in limits:
    pair = [
      limit.array.at[
        limit.stored_row(row),
        head if limit.array.shape[1] > 1 else 0,
        block if limit.array.shape[2] > 1 else 0,
        i,
      ][...]
      for i in (0, 1)
    ]
    begin = jnp.maximum(begin, pair[0])
    end = jnp.minimum(end, pair[1] + 1)
  if any(isinstance(c, Segments | Dense) for c in options.conditions):
    return [(begin, end, False)]
  full = length // size
  # The other conditions allow intervals whose bounds never decrease or never
  # increase: what both `first` and `last` allow, all positions between allow.
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
  """The intersection (low, high) of all ranges; high None is unbounded."""
  low, high = 0, None
  for find_range in ranges:
    new_low, new_high = find_range(first, last)
    if new_low is not None:
      low = jnp.maximum(low, new_low)
    if new_high is not None:
      high = new_high if high is None else jnp.minimum(high, new_high)
  return low, high
