"""Operands of the kernels, indexed by row of the flattened batch.

Inside a kernel, these pytrees hold references in place of arrays. A tile is
queries × keys or keys × queries. Its positions are two integer arrays that
broadcast to its shape.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops import batching
from attention.ops.biases import Relative
from attention.ops.conditions import Dense, Segments

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Shape:
  """The static sizes of the operands."""

  batch: tuple
  num_query: int
  num_key: int
  heads: int
  groups: int
  key_size: int
  value_size: int

  @property
  def rows(self) -> int:
    return math.prod(self.batch)

  @property
  def shared(self) -> int:
    """The number of query heads that share a key head."""
    return self.heads // self.groups


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerRow:
  """An array whose leading axes, flattened to one, broadcast to the batch."""

  array: object  # [rows', …]
  batch: tuple = dataclasses.field(metadata={'static': True})  # shape of rows'
  whole: tuple = dataclasses.field(metadata={'static': True})  # full batch

  @classmethod
  def create(cls, array, trailing: int, whole: tuple) -> 'PerRow':
    array = jnp.asarray(array)
    lead = array.shape[: max(array.ndim - trailing, 0)]
    lead = (1,) * (len(whole) - len(lead)) + lead
    if array.dtype == bool:  # Triton's references hold bytes
      array = array.astype(jnp.int8)
    flat = batching.flatten(array, trailing)
    return cls(flat.reshape(math.prod(lead), *flat.shape[1:]), lead, whole)

  def stored_row(self, row):
    """The row of the array that a batch row reads."""
    if self.batch == self.whole:
      return row
    number, stride = 0, 1
    for size, whole in zip(self.batch[::-1], self.whole[::-1], strict=True):
      if size > 1:
        number = number + lax.rem(row, whole) * stride
      row, stride = lax.div(row, whole), stride * size
    return number

  @property
  def sharing(self) -> int:
    """The number of batch rows that read the same row of the array."""
    return math.prod(self.whole) // math.prod(self.batch)

  def batch_row(self, number, share):
    """The `share`-th batch row that reads row `number` of the array."""
    row, stride = 0, 1
    for size, whole in zip(self.batch[::-1], self.whole[::-1], strict=True):
      if size > 1:
        place, number = lax.rem(number, whole), lax.div(number, whole)
      else:
        place, share = lax.rem(share, whole), lax.div(share, whole)
      row, stride = row + place * stride, stride * whole
    return row

  def at(self, row, *places):
    """A reference to entries; axes of size 1 broadcast."""
    sizes = self.array.shape[1:]
    places = [0 if n == 1 else p for n, p in zip(sizes, places, strict=True)]
    return self.array.at[(self.stored_row(row), *places)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
  """The attention `Options`, laid out for kernels."""

  bias: object  # PerRow [rows', h', q', k'], Distances or None
  conditions: tuple  # of the mask, with `PerRow`s for arrays
  sinks: object  # [h] or None
  dropout: object
  scale: float = dataclasses.field(metadata={'static': True})
  logit_cap: object = dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distances:
  """A bias by key - query, from 1 - q to k - 1."""

  array: object  # [h', q + k - 1] float32


def prepare(query, key, value, options):
  """Return (`Shape`, (query, key, value, `Operands`)), with a flat batch."""
  *batch, num_query, heads, key_size = query.shape
  batch = tuple(batch) or (1,)
  num_key, groups, value_size = value.shape[-3:]
  shape = Shape(batch, num_query, num_key, heads, groups, key_size, value_size)
  bias = options.bias
  if isinstance(bias, Relative):
    bias = Distances(bias.by_distance(num_query, num_key))
  elif bias is not None:
    bias = PerRow.create(bias.array, 3, batch)
  conditions = () if options.mask is None else options.mask.conditions
  conditions = tuple(
    jax.tree.map(lambda x, c=c: PerRow.create(x, c.trailing, batch), c)
    for c in conditions
  )
  dropout = options.dropout
  if dropout is not None:
    dropout = dataclasses.replace(
      dropout,
      start=_in_memory(dropout.start),
      key_start=_in_memory(dropout.key_start),
    )
  flat = (x.reshape(shape.rows, *x.shape[-3:]) for x in (query, key, value))
  operands = Operands(
    bias, conditions, options.sinks, dropout, options.scale, options.logit_cap
  )
  return shape, (*flat, operands)


def _in_memory(position):
  """A position as an array, which kernels can refer to; None stays."""
  if position is not None:
    return jnp.asarray(position, jnp.int32).reshape(1)


def is_per_row(x) -> bool:
  return isinstance(x, PerRow)


def limits(shape, operands, queries: int, keys: int, axis: int):
  """Find the block ranges that segment and dense masks leave.

  This runs outside the kernels.

  Args:
    shape: the `Shape` of the operands.
    operands: the `Operands`, holding arrays.
    queries: queries per block.
    keys: keys per block.
    axis: 0 for the key blocks that each query block attends to, 1 for the query
      blocks that attend to each key block.

  Returns:
    A list of `PerRow`s [rows', h', blocks, 2] int32: the first and last block.
  """
  found = []
  for condition in operands.conditions:
    if isinstance(condition, Segments):
      batch = condition.query_ids.batch, condition.key_ids.batch
      (low, high), (other_low, other_high) = (
        _extremes(ids.array, size)
        for ids, size in (
          (condition.query_ids, queries),
          (condition.key_ids, keys),
        )
      )
      if batch[0] != batch[1]:
        continue
      meets = (low[:, :, None] <= other_high[:, None]) & (
        other_low[:, None] <= high[:, :, None]
      )
      meets, like = meets[:, None], condition.query_ids
    elif isinstance(condition, Dense):
      like = condition.array
      meets = like.array != 0
      for at, size in ((2, queries), (3, keys)):
        meets = _any_in_blocks(meets, size, at)
    else:
      continue
    if axis == 1:
      meets = meets.swapaxes(2, 3)
    count = meets.shape[3]
    numbers = jnp.arange(count, dtype=jnp.int32)
    first = jnp.where(meets, numbers, count).min(3)
    last = jnp.where(meets, numbers, -1).max(3)
    if count == 1:  # a size-1 axis broadcasts over all blocks
      last = jnp.where(last == 0, 2**30, -1)
    ranges = jnp.stack([first, last], 3)
    found.append(PerRow(ranges, like.batch, like.whole))
  return found


def _extremes(ids, size):
  """The smallest and largest id of each block: [r, n] → two [r, blocks]."""
  low, high = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
  pad = [(0, 0), (0, -ids.shape[1] % size)]

  def blocks(fill):
    padded = jnp.pad(ids.astype(jnp.int32), pad, constant_values=fill)
    return padded.reshape(len(ids), -1, size)

  return blocks(high).min(2), blocks(low).max(2)


def _any_in_blocks(x, size, axis):
  if x.shape[axis] == 1:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = 0, -x.shape[axis] % size
  x = jnp.pad(x, pad)
  shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  return x.reshape(shape).any(axis + 1)


def sinks_gradient(options, top, log_total, delta):
  """The sinks' gradient, or None; statistics are [*b, q, h], logits base 2."""
  if options.sinks is None:
    return None
  sinks = options.sinks.astype(jnp.float32) * LOG2E
  weights = jnp.exp2(sinks - top - log_total)
  lead = tuple(range(delta.ndim - 1))
  return -(weights * delta).sum(lead).astype(options.sinks.dtype)
