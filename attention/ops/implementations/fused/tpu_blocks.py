"""Inputs of TPU kernels: blocks of arrays in vector memory, and scalars.

Arrays are laid out as [rows, heads, channels, positions]. Positions lie along
the lanes of a vector register, so that no head size needs padding. Kernels read
blocks of these arrays from vector memory. Scalars, such as the lengths in a
mask, are in scalar memory as whole arrays.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from attention.ops.conditions import Band, Dense, Segments
from attention.ops.implementations.fused import operands
from attention.ops.implementations.fused.operands import Distances, is_per_row
from attention.ops.implementations.fused.tile import Tile

_LANES = 128  # positions per block are a multiple of this
_CHANNELS = 16  # channels too: the sublanes of a 16-bit register
_MAX_SCALARS = 2**15  # for block ranges in scalar memory


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """The number of queries and keys per block."""

  queries: int
  keys: int

  @classmethod
  def choose(cls, shape, itemsize: int, most: int) -> 'BlockSizes':
    """Choose blocks that fit in vector memory, with little padding."""
    if max(shape.key_size, shape.value_size) * itemsize > 256:
      most = min(most, 256)
    return cls(
      *(_balanced_size(n, most) for n in (shape.num_query, shape.num_key))
    )


def _balanced_size(length, most):
  """The block size that splits a length into the fewest, equal blocks."""
  return _ceil(-(-length // -(-length // most)), _LANES)


def _ceil(number, multiple):
  return -(-number // multiple) * multiple


class Place(NamedTuple):
  """The tile that a program computes."""

  row: object
  head: object
  query: object  # block number
  key: object  # block number
  is_needed: object = True  # False if fully masked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
  """An array that programs read by block; in a kernel, a block's reference."""

  array: object
  size: tuple = dataclasses.field(metadata={'static': True})  # None: squeezed
  index: object = dataclasses.field(metadata={'static': True})  # from a `Place`
  is_column: bool = dataclasses.field(
    metadata={'static': True}, default=False
  )  # stored as a row, read as a column

  def read(self):
    """Load the block, transposing it if `is_column`; that needs 32 bits."""
    x = self.array[...]
    if not self.is_column:
      return x
    return jnp.broadcast_to(x, (8, x.shape[1])).T[:, :1]


def is_block(x) -> bool:
  return isinstance(x, Block)


def _pad(x, axis, multiple, fill=0):
  pad = [(0, 0)] * x.ndim
  pad[axis] = 0, _ceil(x.shape[axis], multiple) - x.shape[axis]
  return jnp.pad(x, pad, constant_values=fill)


def positions(x, size, index, multiple: int = _CHANNELS, fill=0) -> Block:
  """[rows, n, heads, c] → a `Block` of [rows, heads, c, n], c and n padded."""
  x = _pad(_pad(x.transpose(0, 2, 3, 1), 2, multiple), 3, size, fill)
  return Block(x, (None, None, x.shape[2], size), index)


def restore(x, length: int, channels: int):
  """The inverse of `positions`, applied to its array."""
  return x[:, :, :channels, :length].transpose(0, 3, 1, 2)


def of_queries(place):
  """Index of a query block."""
  return place.row, place.head, 0, place.query


def of_keys(shared: int):
  """Index of a key block, whose head is shared by `shared` query heads."""
  return lambda place: (place.row, lax.div(place.head, shared), 0, place.key)


def lay_out(
  shape, options: operands.Operands, sizes: BlockSizes
) -> operands.Operands:
  """The operands with `Block`s in place of arrays; scalars are unchanged."""
  bias = options.bias
  if isinstance(bias, Distances):
    bias = Distances(_by_distance(bias.array, shape, sizes))
  elif bias is not None:
    bias = _entries(bias, sizes)
  conditions = []
  for condition in options.conditions:
    if isinstance(condition, Dense):
      condition = Dense(_entries(condition.array, sizes))
    elif isinstance(condition, Segments):
      condition = Segments(
        _ids(condition.query_ids, sizes.queries, 'query'),
        _ids(condition.key_ids, sizes.keys, 'key'),
      )
    conditions.append(condition)
  return dataclasses.replace(options, bias=bias, conditions=tuple(conditions))


def _entries(per_row, sizes):
  """Lay out a `PerRow` [rows', h', q', k'] in blocks of keys × queries."""
  x, bare = per_row.array, dataclasses.replace(per_row, array=None)
  _, heads, num_query, num_key = x.shape
  block_shape = [
    1 if n == 1 else size
    for n, size in ((num_key, sizes.keys), (num_query, sizes.queries))
  ]
  is_column = num_query == 1 and num_key > 1
  if is_column:
    # Store keys along lanes: along sublanes, each would occupy a register.
    block_shape = block_shape[::-1]
  else:
    x = x.swapaxes(2, 3)
  if 1 in block_shape and x.dtype.itemsize < 4:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    x = x.astype(jnp.float32 if is_float else jnp.int32)
  for axis, size in zip((2, 3), block_shape, strict=True):
    x = _pad(x, axis, size)

  def index(place):
    places = [
      0 if n == 1 else block
      for n, block in ((num_key, place.key), (num_query, place.query))
    ]
    places = places[::-1] if is_column else places
    return bare.stored_row(place.row), 0 if heads == 1 else place.head, *places

  return Block(x, (None, None, *block_shape), index, is_column)


def restore_entries(x, block, shape):
  """The inverse of `_entries`: from a block's array to the given shape."""
  _, _, num_query, num_key = shape
  if block.is_column:
    return x[:, :, :, :num_key]
  return x[:, :, :num_key, :num_query].swapaxes(2, 3)


def _ids(per_row, size, axis):
  """Lay out segment ids, a `PerRow` [rows', n], in rows or columns."""
  bare = dataclasses.replace(per_row, array=None)
  x = _pad(per_row.array.astype(jnp.int32), 1, size)[:, None]

  def index(place):
    return bare.stored_row(place.row), 0, getattr(place, axis)

  return Block(x, (None, 1, size), index, is_column=axis == 'key')


def _by_distance(array, shape, sizes):
  """Reverse a bias by key - query, [h', q + k - 1], to run by query - key.

  Distance 0 is at entry `num_key`, the number of keys padded to blocks.
  """
  num_query = _ceil(shape.num_query, sizes.queries)
  num_key = _ceil(shape.num_key, sizes.keys)
  numbers = shape.num_query - 1 + num_key - np.arange(num_query + num_key)
  x = array[:, np.clip(numbers, 0, array.shape[1] - 1)][:, None]
  is_shared = len(x) == 1

  def index(place):
    return 0 if is_shared else place.head, 0, 0

  return Block(x, (None, 1, x.shape[2]), index)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ranges:
  """The first and last block to visit for each block; others are masked."""

  numbers: object  # [rows' · h' · blocks · 2] int32
  # (rows', h', blocks)
  sizes: tuple = dataclasses.field(metadata={'static': True})
  count: int = dataclasses.field(metadata={'static': True})  # blocks to visit
  steps: int = dataclasses.field(metadata={'static': True})  # longest range

  @classmethod
  def create(cls, shape, options, sizes, axis: int) -> 'Ranges':
    """Ranges of key blocks per query block; with axis 1, the reverse."""
    lengths = [(shape.num_query, sizes.queries), (shape.num_key, sizes.keys)]
    (length, size), (other_length, other_size) = (
      lengths[::-1] if axis else lengths
    )
    count = -(-other_length // other_size)
    first = np.arange(0, length, size, dtype=np.int32)
    last = np.minimum(first + size, length) - 1
    begin, end = np.zeros_like(first), np.full_like(first, count - 1)

    def narrow(condition, maximum, minimum):
      range_of = condition.query_range if axis else condition.key_range
      low, high = range_of(first, last)
      return (
        begin if low is None else maximum(begin, low // other_size),
        end if high is None else minimum(end, high // other_size),
      )

    ranged = [
      c for c in options.conditions if not isinstance(c, Dense | Segments)
    ]
    is_static = [isinstance(c, Band) and not jax.tree.leaves(c) for c in ranged]
    for c, static in zip(ranged, is_static, strict=True):
      if static:
        begin, end = narrow(c, np.maximum, np.minimum)
    steps = max(int((end - begin).max()) + 1, 1)
    begin, end = begin[None, None], end[None, None]
    for c, static in zip(ranged, is_static, strict=True):
      if not static:
        c = jax.tree.map(_expand, c, is_leaf=is_per_row)
        begin, end = narrow(c, jnp.maximum, jnp.minimum)
    for limit in operands.limits(
      shape, options, sizes.queries, sizes.keys, axis
    ):
      x = _expand(limit)
      begin, end = jnp.maximum(begin, x[..., 0]), jnp.minimum(end, x[..., 1])
    begin, end = jnp.broadcast_arrays(begin, end)
    if 2 * begin.size > _MAX_SCALARS:
      begin = begin.min((0, 1), keepdims=True)
      end = end.max((0, 1), keepdims=True)
    numbers = jnp.stack([begin, end], -1).astype(jnp.int32).ravel()
    return cls(numbers, begin.shape, count, steps)

  def at(self, row, head, block, step):
    """(block to read, whether it is needed) at a program's step."""
    number = 0
    for size, place in zip(self.sizes, (row, head, block), strict=True):
      number = number * size + (0 if size == 1 else place)
    first, last = self.numbers[2 * number], self.numbers[2 * number + 1]
    block = first + step
    return jnp.clip(jnp.minimum(block, last), 0, self.count - 1), block <= last


def _expand(per_row):
  """Expand to batch rows: [rows or 1, …], or [rows or 1, 1, 1] of scalars."""
  x, count = per_row.array, math.prod(per_row.whole)
  if 1 < len(x) < count:
    x = x[per_row.stored_row(np.arange(count, dtype=np.int32))]
  return x[:, None, None] if x.ndim == 1 else x


class TpuTile(Tile):
  """A tile of keys × queries, with its arrays as blocks in vector memory."""

  @property
  def padded_query(self):
    return _ceil(self.shape.num_query, self.queries.size)

  def entries(self, array):
    x = array.read()
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.int32)

  def distances(self, bias):
    keys, queries = self.keys.size, self.queries.size
    line = bias.array.array
    key, query = self.keys[0, 0], self.queries[0, 0]
    # Entry x of the window holds the distance query - key = x - keys.
    start = query - key + line.shape[1] - self.padded_query - keys
    window = line[:, pl.ds(pl.multiple_of(start, _LANES), keys + queries)]
    window = jnp.broadcast_to(window, (keys, keys + queries))
    return pltpu.roll(window, 0, 1, stride=1, stride_axis=0)[:, keys:]

  def ids(self, condition):
    return condition.query_ids.read(), condition.key_ids.read()

  def scalars(self, condition):
    def scalar(per_row):
      return per_row.array[per_row.stored_row(self.row)]

    return jax.tree.map(scalar, condition, is_leaf=is_per_row)
