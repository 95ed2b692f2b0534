"""Attention whose positions are cut over devices, around a ring.

Every device keeps its queries. Keys and values travel around a ring, while each
device attends to the piece that it holds (Liu et al. 2023, "Ring Attention with
Blockwise Transformers"). Partial results are joined by their softmax
denominators. In the backward pass the pieces go around once more, with their
gradients. A piece is a fraction of a device's keys, and queries are taken a
chunk at a time, so that little is held twice.

Position p of device i is global position start + stride · p. Contiguous shards
have stride 1; striped ones have the number of devices as stride, so that every
device has the same causal work (Brandon et al. 2023, "Striped Attention").
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops.biases import ArrayBias, PlacedRelative
from attention.ops.conditions import LEAST, Dense, Placed, Segments
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
)
from attention.ops.masks import Mask

# The smallest piece of keys and chunk of queries, and the most of each that a
# shard is divided into.
_LEAST, _MOST = 512, 16
_f32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Ring(Implementation):
  """Attention over a mesh axis; arguments are one device's shards.

  Arrays of biases and dense masks have local queries and all keys, in their
  global order.
  """

  axis_name: object  # a mesh axis, or several
  whole: Implementation  # attention without a ring, that has `of_blocks`
  is_striped: bool = False

  def forward(self, query, key, value, options):
    ring = _Ring.of(self, query, key, options)
    inner = self.whole.of_blocks(*ring.examples(query, key, value), options)

    def step(place, softmax, piece, nothing):
      key, value, *ids = piece
      (chunk,) = ring.queries(place, query)
      part = inner.forward(chunk, key, value, ring.options_at(place, ids))
      before = ring.queries(place, *softmax)
      return ring.put(place, softmax, _join(before, *part)), nothing

    zeros = jnp.zeros(query.shape[:-1], _f32)
    values = jnp.zeros((*query.shape[:-1], value.shape[-1]), _f32)
    softmax = zeros + LEAST, zeros, values
    (top, total, values), _ = ring.go_round(step, softmax, key, value)
    if options.sinks is not None:
      total = total + jnp.exp(options.sinks.astype(_f32) - top)
    # An infinite denominator zeroes the weights of fully masked rows.
    total = jnp.where(total > 0, total, jnp.inf)
    output = (values / total[..., None]).astype(query.dtype)
    return output, top, jnp.log(total)

  def backward(
    self, query, key, value, options, output, top, log_total, d_output
  ):
    ring = _Ring.of(self, query, key, options)
    inner = self.whole.of_blocks(*ring.examples(query, key, value), options)

    def step(place, gradients, piece, of_piece):
      key, value, *ids = piece
      chunk, *saved = ring.queries(
        place, query, output, top, log_total, d_output
      )
      dq, *of_block, d_options = inner.backward(
        chunk, key, value, ring.options_at(place, ids), *saved
      )
      d_query, d_bias = gradients
      (before,) = ring.queries(place, d_query)
      d_query = ring.put(place, [d_query], [before + dq.astype(_f32)])[0]
      d_bias = ring.add_bias_gradient(d_bias, d_options.bias, place)
      of_piece = [
        x + y.astype(_f32) for x, y in zip(of_piece, of_block, strict=True)
      ]
      return (d_query, d_bias), of_piece

    zeros = jnp.zeros(query.shape, _f32), ring.zero_bias_gradient()
    (d_query, d_bias), (d_key, d_value) = ring.go_round(
      step, zeros, key, value, with_gradients=True
    )
    d_sinks = None
    if options.sinks is not None:
      delta = (d_output.astype(_f32) * output.astype(_f32)).sum(-1)
      weights = jnp.exp(options.sinks.astype(_f32) - top - log_total)
      d_sinks = -(weights * delta).sum(range(delta.ndim - 1))
      d_sinks = d_sinks.astype(options.sinks.dtype)
    return (
      d_query.astype(query.dtype),
      d_key,
      d_value,
      gradient_of_options(
        options, bias=ring.finish_bias_gradient(d_bias), sinks=d_sinks
      ),
    )


def _join(softmax, output, block_top, log_total):
  """Add a piece's normalised output to (top, total, sum of values)."""
  top, total, values = softmax
  new_top = jnp.maximum(top, block_top)
  shrink = jnp.exp(top - new_top)
  # Fully masked rows of a piece have an infinite denominator, whose exponential
  # must not be computed: XLA may multiply it by 0 before it selects.
  is_masked = jnp.isinf(log_total)
  total_of_block = jnp.exp(jnp.where(is_masked, 0, log_total))
  weight = total_of_block * jnp.exp(block_top - new_top)
  weight = jnp.where(is_masked, 0, weight)
  values = values * shrink[..., None]
  values = values + output.astype(_f32) * weight[..., None]
  return new_top, total * shrink + weight, values


class _Place(NamedTuple):
  """Which queries meet which keys."""

  chunk: object  # number of this device's chunk of queries
  held: object  # the device that the piece belongs to
  piece: object  # its number there


@dataclasses.dataclass(frozen=True)
class _Ring:
  """The ring seen by one device, and the options of each chunk and piece."""

  options: object
  axis_name: object  # a mesh axis, or several
  is_striped: bool
  count: int  # devices
  axis: int  # of positions in query and key
  num_query: int  # of a chunk
  num_chunks: int
  num_key: int  # of a piece
  num_pieces: int

  @classmethod
  def of(cls, implementation, query, key, options):
    name = implementation.axis_name
    return cls(
      options,
      name,
      implementation.is_striped,
      lax.axis_size(name),
      query.ndim - 3,
      *_divide(query.shape[-3]),
      *_divide(key.shape[-3]),
    )

  def examples(self, *arrays):
    """Shapes and dtypes of a chunk of the query and pieces of key and value."""
    sizes = self.num_query, self.num_key, self.num_key
    return [
      jax.ShapeDtypeStruct((*x.shape[:-3], n, *x.shape[-2:]), x.dtype)
      for x, n in zip(arrays, sizes, strict=True)
    ]

  def go_round(self, step, carry, key, value, with_gradients=False):
    """Fold a function over this device's chunks and all devices' pieces.

    Args:
      step: a function (place, carry, piece, gradients) -> (carry, gradients);
        a piece is (key, value, *ids of segments). Gradients of the piece travel
        with it, or are ().
      carry: its initial value.
      key: this device's keys.
      value: this device's values.
      with_gradients: whether key and value have gradients.

    Returns:
      The carry, and the gradients of key and value, or ().
    """
    ids = [
      jnp.asarray(c.key_ids)
      for c in self._conditions
      if isinstance(c, Segments)
    ]
    home = (key, value) if with_gradients else ()

    def go(number, carry):
      carry, home = carry
      start = number * self.num_key
      piece = [
        *(self._slice(x, start, self.num_key) for x in (key, value)),
        *(lax.dynamic_slice_in_dim(x, start, self.num_key, -1) for x in ids),
      ]
      zeros = [jnp.zeros(x.shape, _f32) for x in piece[: len(home)]]

      def meet(turn, carry):
        carry, piece, gradients = carry
        held = (lax.axis_index(self.axis_name) - turn) % self.count
        # Sent before the products, which the transfer may overlap.
        after = self._send(piece)

        def attend(chunk, carry):
          place = _Place(chunk, held, number)
          return lax.cond(
            self._is_visible(place),
            lambda carry, gradients: step(place, carry, piece, gradients),
            lambda *carry: carry,
            *carry,
          )

        carry = lax.fori_loop(0, self.num_chunks, attend, (carry, gradients))
        return carry[0], after, self._send(carry[1])

      carry, _, gradients = lax.fori_loop(
        0, self.count, meet, (carry, piece, zeros)
      )
      home = tuple(
        lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), start, self.axis)
        for x, y in zip(home, gradients, strict=True)
      )
      return carry, home

    return lax.fori_loop(0, self.num_pieces, go, (carry, home))

  def _send(self, arrays):
    """Pass arrays to the next device and receive those of the previous one."""
    ring = [(i, (i + 1) % self.count) for i in range(self.count)]
    send = functools.partial(lax.ppermute, axis_name=self.axis_name, perm=ring)
    return jax.tree.map(send, arrays)

  def _slice(self, x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size, self.axis)

  def queries(self, place, *arrays):
    """Take the rows of a chunk of queries from arrays [*b, q, …]."""
    start = place.chunk * self.num_query
    return [self._slice(x, start, self.num_query) for x in arrays]

  def put(self, place, arrays, chunks):
    """Replace the rows of a chunk of queries."""
    start = place.chunk * self.num_query
    return tuple(
      lax.dynamic_update_slice_in_dim(x, y, start, self.axis)
      for x, y in zip(arrays, chunks, strict=True)
    )

  @property
  def _conditions(self):
    return () if self.options.mask is None else self.options.mask.conditions

  @property
  def _stride(self) -> int:
    return self.count if self.is_striped else 1

  def _starts(self, place):
    """The global positions of the first query and the first key."""
    own, held = lax.axis_index(self.axis_name), place.held
    query, key = place.chunk * self.num_query, place.piece * self.num_key
    if self.is_striped:
      return own + self.count * query, held + self.count * key
    return (
      own * self.num_chunks * self.num_query + query,
      held * self.num_pieces * self.num_key + key,
    )

  def options_at(self, place, ids):
    """The options of a chunk of queries and a piece of keys."""
    options, ids = self.options, iter(ids)
    query, key = self._starts(place)

    def placed(condition):
      if isinstance(condition, Dense):
        return Dense(self._block(condition.array, place))
      if isinstance(condition, Segments):
        rows = lax.dynamic_slice_in_dim(
          jnp.asarray(condition.query_ids),
          place.chunk * self.num_query,
          self.num_query,
          -1,
        )
        return Segments(rows, next(ids))
      return Placed(condition, query, key, self._stride)

    mask = None
    if options.mask is not None:
      mask = Mask(tuple(map(placed, self._conditions)))
    bias = options.bias
    if isinstance(bias, ArrayBias):
      bias = ArrayBias(self._block(bias.array, place))
    elif bias is not None:
      bias = PlacedRelative(bias, key - query, self._stride)
    dropout = options.dropout
    if dropout is not None:
      dropout = dataclasses.replace(
        dropout, start=query, key_start=key, stride=self._stride
      )
    return dataclasses.replace(
      options, bias=bias, mask=mask, dropout=dropout, sinks=None
    )

  def _is_visible(self, place):
    """Whether any of the queries may attend to any of the keys."""
    visible = jnp.bool_(True)
    query, key = self._starts(place)
    last_query, last_key = (
      start + self._stride * (count - 1)
      for start, count in ((query, self.num_query), (key, self.num_key))
    )
    for condition in self._conditions:
      low, high = condition.key_range(query, last_query)
      if low is not None:
        visible &= jnp.min(low) <= last_key
      if high is not None:
        visible &= jnp.max(high) >= key
    return visible

  def _block(self, array, place):
    """The rows and columns of an array [..., q, k] at a place."""
    array = jnp.asarray(array)
    if array.shape[-2] > 1:
      start = place.chunk * self.num_query
      array = lax.dynamic_slice_in_dim(array, start, self.num_query, -2)
    if array.shape[-1] == 1:
      return array
    start = place.piece * self.num_key
    if self.is_striped:
      array = array.reshape(*array.shape[:-1], -1, self.count)
      array = lax.dynamic_slice_in_dim(array, start, self.num_key, -2)
      return lax.dynamic_index_in_dim(array, place.held, -1, keepdims=False)
    start = start + place.held * self.num_pieces * self.num_key
    return lax.dynamic_slice_in_dim(array, start, self.num_key, -1)

  def zero_bias_gradient(self):
    """Zeros; those of an array are [..., q, devices, k of a device]."""
    bias = self.options.bias
    if not isinstance(bias, ArrayBias):
      return None if bias is None else bias.zero_gradient()
    *lead, queries, keys = bias.array.shape
    # Entries of whole arrays are written once, others are sums.
    is_sum = queries == 1 or keys == 1
    devices = 1 if keys == 1 else self.count
    shape = *lead, queries, devices, keys // devices
    return jnp.zeros(shape, _f32 if is_sum else bias.array.dtype)

  def add_bias_gradient(self, gradient, block, place):
    bias = self.options.bias
    if bias is None:
      return None
    if not isinstance(bias, ArrayBias):
      return jax.tree.map(lambda x, y: x + y.astype(_f32), gradient, block.bias)
    block = block.array[..., None, :].astype(gradient.dtype)
    queries = gradient.shape[-3]
    at = [0] * gradient.ndim
    at[-3] = place.chunk * self.num_query if queries > 1 else 0
    if bias.array.shape[-1] > 1:
      at[-2:] = place.held, place.piece * self.num_key
    before = lax.dynamic_slice(gradient, at, block.shape)
    return lax.dynamic_update_slice(gradient, before + block, at)

  def finish_bias_gradient(self, gradient):
    bias = self.options.bias
    if not isinstance(bias, ArrayBias):
      return None if bias is None else bias.finish_gradient(gradient)
    if self.is_striped:
      gradient = jnp.swapaxes(gradient, -1, -2)
    gradient = gradient.reshape(bias.array.shape)
    return ArrayBias(gradient.astype(bias.array.dtype))


def _divide(length):
  """Return (size, number) of the parts of a shard's positions."""
  number = max(
    n
    for n in range(1, _MOST + 1)
    if length % n == 0 and (n == 1 or length // n >= _LEAST)
  )
  return length // number, number
