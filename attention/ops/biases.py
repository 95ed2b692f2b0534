"""Biases that are added to the logits one tile at a time.

A bias computes any tile of itself and accumulates its gradient tile by tile, in
the shape of its own parameters. Arrays, ALiBi and T5's buckets share this
interface.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attention.ops import batching
from attention.ops.softmax import FLOATS


class Bias:
  """The interface of biases; a bias is a pytree of its parameters."""

  def to_array(self, num_query: int, num_key: int) -> jax.Array:
    """Return the whole bias, broadcastable to the logits [*b, h, q, k]."""
    raise NotImplementedError

  def tile(self, batch, row, rows, query, num_query, key, num_key):
    """Return a tile, broadcastable to [rows, h, num_query, num_key].

    Args:
      batch: shape of the whole batch, *b.
      row: first row of the flattened batch; may be traced, like `query` and
        `key`.
      rows: number of rows.
      query: first query.
      num_query: number of queries.
      key: first key.
      num_key: number of keys.
    """
    raise NotImplementedError

  def columns(self, query, num_query, keys):
    """Return the rows of `num_query` queries from `query` on, at some keys.

    Args:
      query: first query; may be traced.
      num_query: number of queries.
      keys: [k] ints, the keys' positions; may be traced.

    Returns:
      [h, num_query, k], or an array broadcastable to [*b, h, num_query, k].
    """
    raise NotImplementedError

  def zero_gradient(self):
    """Return the initial value for `add_gradient` to accumulate into."""
    raise NotImplementedError

  def add_gradient(self, gradient, d_tile, batch, row, query, key):
    """Accumulate a tile's gradient; d_tile: float32 [rows, h, q, k]."""
    raise NotImplementedError

  def finish_gradient(self, gradient) -> 'Bias':
    """Return the accumulated gradient as a pytree like the bias itself."""
    raise NotImplementedError


def _sum_rows(x):
  """Sum [r, …] → [1, …] by halving; XLA's own sum is far slower on CPU."""
  total = jnp.zeros((), x.dtype)
  while len(x) > 1:
    half = len(x) // 2
    if len(x) % 2:
      total = total + x[-1:]
    x = x[:half] + x[half : 2 * half]
  return total + x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ArrayBias(Bias):
  """An array of the logits' rank, broadcastable to them."""

  array: object

  def to_array(self, num_query, num_key):
    return self.array

  def tile(self, batch, row, rows, query, num_query, key, num_key):
    x = batching.take_rows(self.array, 3, batch, row, rows)
    x = batching.take_block(x, query, num_query, 2)
    return batching.take_block(x, key, num_key, 3).astype(jnp.float32)

  def columns(self, query, num_query, keys):
    x = jnp.asarray(batching.take_block(self.array, query, num_query, -2))
    return x if x.shape[-1] == 1 else x[..., keys]

  def zero_gradient(self):
    return jnp.zeros(batching.flatten(self.array, 3).shape, jnp.float32)

  def add_gradient(self, gradient, d_tile, batch, row, query, key):
    numbers = batching.row_numbers(self.array.shape[:-3], batch)
    rows, _, num_query, num_key = d_tile.shape
    # Sum over the axes along which the bias broadcasts.
    whole = (1 if numbers is None else rows, *gradient.shape[1:])
    if whole[0] == 1:
      d_tile = _sum_rows(d_tile)
    axes = [i for i in (1, 2, 3) if whole[i] == 1 and d_tile.shape[i] > 1]
    d_tile = d_tile.sum(axes, keepdims=True)
    start = [0, 0, query, key]
    size = [len(d_tile), *gradient.shape[1:2], num_query, num_key]
    for i in (2, 3):
      if gradient.shape[i] == 1:
        start[i], size[i] = 0, 1
    if numbers is not None and len(gradient) == len(numbers):
      start[0] = row
    elif numbers is not None:
      # Some rows share an entry of the bias, so they are added one by one.
      for i in range(rows):
        at = [jnp.asarray(numbers)[row + i], *start[1:]]
        gradient = batching.add_block(gradient, d_tile[i : i + 1], at)
      return gradient
    return batching.add_block(gradient, d_tile, start)

  def finish_gradient(self, gradient):
    gradient = gradient.reshape(self.array.shape).astype(self.array.dtype)
    return ArrayBias(gradient)


class Relative(Bias):
  """A bias that is a function of key - query and a few parameters."""

  def at(self, distance) -> jax.Array:
    """Return the bias [h, q, k] at distances [q, k]."""
    raise NotImplementedError

  def to_array(self, num_query, num_key):
    return self._block(0, num_query, 0, num_key)

  def by_distance(self, num_query: int, num_key: int) -> jax.Array:
    """Return [h or 1, q + k - 1] float32 for distances 1 - q to k - 1."""
    return self.at(jnp.arange(1 - num_query, num_key)[None])[:, 0]

  def distance_gradient(self, gradient, num_query: int, num_key: int):
    """Convert the gradient of `by_distance` to that of the bias."""
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), self)
    _, vjp = jax.vjp(lambda bias: bias.by_distance(num_query, num_key), exact)
    return self.finish_gradient(vjp(gradient)[0])

  def _block(self, query, num_query, key, num_key):
    return self.columns(query, num_query, key + jnp.arange(num_key))

  def columns(self, query, num_query, keys):
    return self.at(keys - (query + jnp.arange(num_query))[:, None])

  def tile(self, batch, row, rows, query, num_query, key, num_key):
    return self._block(query, num_query, key, num_key)[None]

  def zero_gradient(self):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), self)

  def add_gradient(self, gradient, d_tile, batch, row, query, key):
    queries = query + jnp.arange(d_tile.shape[2])
    keys = key + jnp.arange(d_tile.shape[3])
    return self.add_gradient_at(gradient, d_tile, keys - queries[:, None])

  def add_gradient_at(self, gradient, d_tile, distance):
    """Accumulate the gradient of a tile [rows, h, q, k] at distances [q, k]."""
    d_tile = _sum_rows(d_tile)[0]
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), self)
    block, vjp = jax.vjp(lambda bias: bias.at(distance), exact)
    if len(block) == 1:  # shared by all heads
      d_tile = d_tile.sum(0, keepdims=True)
    return jax.tree.map(jnp.add, gradient, vjp(d_tile)[0])

  def finish_gradient(self, gradient):
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlacedRelative(Relative):
  """A bias at distances offset + stride · d of a shard's distances d.

  Its gradient is that of the bias it places, at the same offset.
  """

  bias: object  # Relative
  offset: object  # of the first key from the first query; may be traced
  stride: int = dataclasses.field(metadata={'static': True})

  def at(self, distance):
    return self.bias.at(self.offset + self.stride * distance)

  def zero_gradient(self):
    return self.bias.zero_gradient()

  def add_gradient(self, gradient, d_tile, batch, row, query, key):
    num_query, num_key = d_tile.shape[2:]
    distance = (
      key - query + jnp.arange(num_key) - jnp.arange(num_query)[:, None]
    )
    distance = self.offset + self.stride * distance
    return self.bias.add_gradient_at(gradient, d_tile, distance)

  def distance_gradient(self, gradient, num_query, num_key):
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), self.bias)

    def by_distance(bias):
      placed = dataclasses.replace(self, bias=bias)
      return placed.by_distance(num_query, num_key)

    _, vjp = jax.vjp(by_distance, exact)
    return self.finish_gradient(vjp(gradient)[0])

  def finish_gradient(self, gradient):
    return dataclasses.replace(self, bias=self.bias.finish_gradient(gradient))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi(Relative):
  """-slope · |query - key| (Press et al. 2022)."""

  slopes: object  # [h]

  def at(self, distance):
    slopes = self.slopes.astype(jnp.float32)[:, None, None]
    return -slopes * jnp.abs(distance).astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativeBuckets(Relative):
  """A learned table with an entry per head and bucket of distances (T5)."""

  table: object  # [num_buckets, h]
  num_buckets: int = dataclasses.field(metadata={'static': True})
  max_distance: int = dataclasses.field(metadata={'static': True})
  is_bidirectional: bool = dataclasses.field(metadata={'static': True})

  def at(self, distance):
    buckets = self.buckets(distance)
    one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=jnp.float32)
    table = self.table.astype(jnp.float32)
    return jnp.einsum('...n,nh->h...', one_hot, table)

  def buckets(self, distance):
    """Map distances key - query to buckets in [0, num_buckets)."""
    count, offset = self.num_buckets, 0
    if self.is_bidirectional:
      count //= 2
      offset = jnp.where(distance > 0, count, 0)
      distance = jnp.abs(distance)
    else:
      distance = jnp.maximum(-distance, 0)
    # Half of the buckets hold one near distance each; the others widen.
    near = count // 2
    ratio = jnp.maximum(distance, 1).astype(jnp.float32) / near
    far = jnp.log(ratio) / math.log(self.max_distance / near) * (count - near)
    far = jnp.minimum(near + far.astype(jnp.int32), count - 1)
    return offset + jnp.where(distance < near, distance, far)


def alibi(num_heads: int) -> Alibi:
  """Create ALiBi, a bias linear in the distance (Press et al. 2022).

  The slopes are a geometric sequence that falls from 2^(-8/h). If h is not a
  power of two, every other slope of the next power fills the remaining heads,
  as in the paper's code.

  Args:
    num_heads: number of heads, h.

  Returns:
    A bias for `dot_product_attention`, whose slopes [h] float32 are a leaf.

  Raises:
    ValueError: num_heads is less than 1.
  """
  if num_heads < 1:
    raise ValueError(f'num_heads: expected 1 or more, got {num_heads}')

  def slopes(count):
    return [2 ** (-8 * (i + 1) / count) for i in range(count)]

  power = 2 ** int(math.log2(num_heads))
  numbers = slopes(power) + slopes(2 * power)[::2][: num_heads - power]
  return Alibi(jnp.array(numbers, jnp.float32))


def relative_buckets(
  table,
  num_buckets: int = 32,
  max_distance: int = 128,
  is_bidirectional: bool = True,
) -> RelativeBuckets:
  """Create T5's relative position bias (Raffel et al. 2020, section 2.1).

  Args:
    table: [num_buckets, h] learned biases, float32, bfloat16 or float16.
    num_buckets: half of the buckets (a quarter per direction if bidirectional)
      hold one near distance each; the others are spaced logarithmically.
    max_distance: distances from here on share the last bucket.
    is_bidirectional: whether keys after the query have separate buckets.

  Returns:
    A bias for `dot_product_attention`, differentiable in the table.

  Raises:
    ValueError: the table has another shape or dtype, or num_buckets or
      max_distance is too small.
  """
  table = jnp.asarray(table)
  if table.ndim != 2 or len(table) != num_buckets:
    raise ValueError(
      f'table: expected [num_buckets={num_buckets}, h], got {table.shape}'
    )
  if table.dtype not in FLOATS:
    raise ValueError(
      f'table: expected float32, bfloat16 or float16, got {table.dtype}'
    )
  sides = 2 if is_bidirectional else 1
  near = num_buckets // (2 * sides)
  if near < 1:
    raise ValueError(
      f'num_buckets: expected {2 * sides} or more, got {num_buckets}'
    )
  if max_distance <= near:
    raise ValueError(
      f'max_distance: expected more than the {near} near buckets, '
      f'got {max_distance}'
    )
  return RelativeBuckets(table, num_buckets, max_distance, is_bidirectional)
