"""Reductions of the logits' gradient to the gradient of a bias."""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from attention.ops.implementations.fused.tile import combine
from attention.ops.masks import Mask


def _diagonals(conditions):
  return Mask(tuple(c for c in conditions if not c.trailing)).diagonals()


def _split(number, sizes):
  """Mixed-radix digits of a number; the last size varies fastest."""
  digits = []
  for size in reversed(sizes):
    digits.append(lax.rem(number, size))
    number = lax.div(number, size)
  return digits[::-1]


@dataclasses.dataclass(frozen=True)
class ArrayReduction:
  """The gradient of a bias array [rows', h', q', k'].

  Each program owns a tile of the gradient and loops over the batch rows and
  heads that share it. If the array has size 1 along queries or keys, the
  program also loops over the blocks of that axis.
  """

  shape: object
  bias: object  # PerRow without its array
  sizes: tuple  # shape of the array
  queries: int  # per block
  keys: int
  low: int | None  # static diagonals of the mask
  high: int | None

  @classmethod
  def create(cls, shape, bias, conditions, queries, keys):
    """Create it for a bias and mask conditions, in tiles of queries × keys."""
    sizes = bias.array.shape
    bias = dataclasses.replace(bias, array=None)
    return cls(shape, bias, sizes, queries, keys, *_diagonals(conditions))

  @property
  def _blocks(self):
    """The numbers of query blocks and key blocks."""
    shape = self.shape
    return -(-shape.num_query // self.queries), -(-shape.num_key // self.keys)

  @property
  def _shared(self):
    """How many rows, heads, query blocks and key blocks share a tile."""
    _, heads, num_query, num_key = self.sizes
    query_blocks, key_blocks = self._blocks
    return (
      self.bias.sharing,
      self.shape.heads if heads == 1 else 1,
      query_blocks if num_query == 1 else 1,
      key_blocks if num_key == 1 else 1,
    )

  @property
  def steps(self) -> int:
    return math.prod(self._shared)

  @property
  def grid(self) -> tuple:
    rows, heads, num_query, num_key = self.sizes
    query_blocks, key_blocks = self._blocks
    return (
      1 if num_key == 1 else key_blocks,
      1 if num_query == 1 else query_blocks,
      heads,
      rows,
    )

  @property
  def output_shape(self) -> tuple:
    return self.sizes

  def count(self, place):
    """Steps of a program: 0 if its tile is fully masked."""
    key_block, query_block, *_ = place
    if 1 in self.sizes[2:]:
      return self.steps
    first, key = query_block * self.queries, key_block * self.keys
    is_needed = True
    if self.low is not None:
      is_needed &= key + self.keys - 1 - first >= self.low
    if self.high is not None:
      is_needed &= key - (first + self.queries - 1) <= self.high
    if is_needed is True:
      return self.steps
    # Multiply, because Triton turns a select of 1 or 0 into a boolean.
    return self.steps * is_needed.astype(jnp.int32)

  def at(self, place, number):
    """(row, head, query block, key block) of a step."""
    key_block, query_block, head, row = place
    share, shared_head, queries, keys = _split(number, self._shared)
    return (
      self.bias.batch_row(row, share),
      head + shared_head,
      query_block + queries,
      key_block + keys,
    )

  def entries(self, place, total):
    """(indices, mask or None, values) for storing a program's tile."""
    key_block, query_block, head, row = place
    _, _, num_query, num_key = self.sizes
    mask, places = None, []
    for block, size, length, axis in (
      (query_block, self.queries, num_query, 0),
      (key_block, self.keys, num_key, 1),
    ):
      if length == 1:
        total = total.sum(axis, keepdims=True)
        positions = jnp.zeros((1, 1), jnp.int32)
      else:
        positions = jnp.expand_dims(block * size + jnp.arange(size), 1 - axis)
        if length % size:
          mask = combine(mask, positions < length)
      places.append(positions)
    return (row, head, *places), mask, total

  def finish(self, sums, bias):
    """The bias's gradient, from the kernel's output."""
    return bias.finish_gradient(sums)


@dataclasses.dataclass(frozen=True)
class DistanceReduction:
  """The gradient of a bias by distance, [h', q + k - 1].

  Each program owns a diagonal of square tiles. It loops along the diagonal, the
  batch rows and the heads that share the bias, and accumulates one tile.
  `finish` reduces these tiles to distances.
  """

  shape: object
  heads: int  # h'
  queries: int  # per block, equal to keys
  keys: int
  low: int | None
  high: int | None

  @classmethod
  def create(cls, shape, bias, conditions, queries, keys):
    """Create it for a bias and mask conditions, in square tiles."""
    heads = bias.array.shape[0]
    return cls(shape, heads, queries, keys, *_diagonals(conditions))

  @property
  def _blocks(self):
    shape = self.shape
    return -(-shape.num_query // self.queries), -(-shape.num_key // self.keys)

  @property
  def _shared(self):
    return self.shape.rows, self.shape.heads if self.heads == 1 else 1

  @property
  def steps(self) -> int:
    return math.prod(self._shared) * min(self._blocks)

  @property
  def grid(self) -> tuple:
    return sum(self._blocks) - 1, self.heads

  @property
  def output_shape(self) -> tuple:
    return self.heads, self.grid[0], self.queries, self.keys

  def _diagonal(self, place):
    """(key block - query block, first query block, number of blocks)."""
    query_blocks, key_blocks = self._blocks
    offset = place[0] - (query_blocks - 1)
    first = jnp.maximum(0, -offset)
    last = jnp.minimum(query_blocks, key_blocks - offset)
    return offset, first, last - first

  def count(self, place):
    """Steps of a program: 0 if its diagonal is fully masked."""
    offset, _, along = self._diagonal(place)
    steps = math.prod(self._shared) * along
    if self.low is not None:
      most = (offset + 1) * self.keys - 1
      steps = jnp.where(most >= self.low, steps, 0)
    if self.high is not None:
      least = (offset - 1) * self.keys + 1
      steps = jnp.where(least <= self.high, steps, 0)
    return steps

  def at(self, place, number):
    """(row, head, query block, key block) of a step."""
    offset, first, along = self._diagonal(place)
    row, head, query = _split(number, (*self._shared, along))
    query = query + first
    return row, place[1] + head, query, query + offset

  def tile_of(self, row, head, query_block, key_block):
    """(head, diagonal) of the tile that a step accumulates into."""
    del row
    diagonal = key_block - query_block + self._blocks[0] - 1
    return head if self.heads > 1 else 0, diagonal

  def entries(self, place, total):
    """(indices, None, values) for storing a program's tile."""
    queries = jnp.arange(self.queries)[:, None]
    return (
      (place[1], place[0], queries, jnp.arange(self.keys)[None]),
      None,
      total,
    )

  def finish(self, sums, bias):
    """The bias's gradient, from tiles [h', diagonals, block, block]."""
    heads, count, size, _ = sums.shape
    # Skew each tile so that entry (i, j) moves to column j - i + size - 1: pad
    # its rows to 2 · size entries and read them as rows of 2 · size - 1.
    sums = jnp.pad(sums[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, size)))
    sums = sums.reshape(heads, count, -1)[..., : size * (2 * size - 1)]
    sums = sums.reshape(heads, count, size, 2 * size - 1).sum(2)
    # Neighbouring tiles share size - 1 distances.
    pad = ((0, 0), (0, 1), (0, 0))
    left = jnp.pad(sums[..., :size], pad)
    right = jnp.pad(sums[..., size:], ((0, 0), (1, 0), (0, 1)))
    line = (left + right).reshape(heads, -1)
    # Entry 0 is the distance from the first tile's last query to its first key.
    query_blocks, _ = self._blocks
    start = query_blocks * size - self.shape.num_query
    total = self.shape.num_query + self.shape.num_key - 1
    line = line[:, start : start + total]
    return bias.distance_gradient(
      line, self.shape.num_query, self.shape.num_key
    )
