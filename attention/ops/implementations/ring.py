"""Attention whose positions are cut over devices, for use in `jax.shard_map`.

Every device keeps its queries. Keys and values travel around a ring, while each
device attends to the block that it holds (Liu et al. 2023, "Ring Attention with
Blockwise Transformers"). Partial results are joined by their softmax
denominators. In the backward pass the blocks go around once more, with their
gradients.

Position p of device i is global position start + stride · p. Contiguous shards
have stride 1; striped ones have the number of devices as stride, so that every
device has the same causal work (Brandon et al. 2023, "Striped Attention").
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops.biases import ArrayBias, PlacedRelative
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
)
from attention.ops.implementations.chunked import TileLoop
from attention.ops.masks import LEAST, Dense, Mask, Placed, Segments


@dataclasses.dataclass(frozen=True)
class Ring(Implementation):
  """Attention over a mesh axis; arguments are one device's shards.

  Arrays of biases and dense masks have local queries and all keys, in their
  global order.
  """

  axis_name: object  # a mesh axis, or several
  is_striped: bool = False
  inner: Implementation = dataclasses.field(default_factory=TileLoop)

  def forward(self, query, key, value, options):
    ring = _Ring.of(self, query, key, options)
    zeros = jnp.zeros(query.shape[:-1], jnp.float32)

    def step(number, carry):
      *softmax, blocks = carry
      held = ring.held(number)
      # Sent before the products, which the transfer may overlap.
      after = ring.send(blocks)

      def attend(top, total, values):
        key, value, ids = blocks
        output, block_top, log_total = self.inner.forward(
          query, key, value, ring.options_of(held, ids)
        )
        return _join((top, total, values), output, block_top, log_total)

      softmax = lax.cond(ring.is_visible(held), attend, lambda *x: x, *softmax)
      return *softmax, after

    values = jnp.zeros((*query.shape[:-1], value.shape[-1]), jnp.float32)
    carry = (zeros + LEAST, zeros, values, (key, value, ring.key_ids))
    top, total, values, _ = lax.fori_loop(0, ring.count, step, carry)
    if options.sinks is not None:
      total = total + jnp.exp(options.sinks.astype(jnp.float32) - top)
    # An infinite denominator zeroes the weights of fully masked rows.
    total = jnp.where(total > 0, total, jnp.inf)
    output = (values / total[..., None]).astype(query.dtype)
    return output, top, jnp.log(total)

  def recompute_backward(
    self, query, key, value, options, output, first, second, d_output
  ):
    """As `backward`, whichever implementation computed the output."""
    del first, second
    _, *residuals = self.forward(query, key, value[..., :1], options)
    return self.backward(
      query, key, value, options, output, *residuals, d_output
    )

  def backward(
    self, query, key, value, options, output, top, log_total, d_output
  ):
    ring = _Ring.of(self, query, key, options)
    f32 = jnp.float32

    def step(number, carry):
      d_query, d_bias, blocks, gradients = carry
      held = ring.held(number)
      after = ring.send(blocks)

      def backward(d_query, d_bias, d_key, d_value):
        key, value, ids = blocks
        dq, dk, dv, d_options = self.inner.backward(
          query,
          key,
          value,
          ring.options_of(held, ids),
          output,
          top,
          log_total,
          d_output,
        )
        d_bias = ring.add_bias_gradient(d_bias, d_options.bias, held)
        sums = (d_query, d_key, d_value)
        new = (dq, dk, dv)
        dq, dk, dv = (a + b.astype(f32) for a, b in zip(sums, new, strict=True))
        return dq, d_bias, dk, dv

      d_query, d_bias, *gradients = lax.cond(
        ring.is_visible(held),
        backward,
        lambda *x: x,
        d_query,
        d_bias,
        *gradients,
      )
      return d_query, d_bias, after, ring.send(tuple(gradients))

    zeros = [jnp.zeros(x.shape, f32) for x in (query, key, value)]
    carry = (
      zeros[0],
      ring.zero_bias_gradient(),
      (key, value, ring.key_ids),
      tuple(zeros[1:]),
    )
    d_query, d_bias, _, (d_key, d_value) = lax.fori_loop(
      0, ring.count, step, carry
    )
    d_sinks = None
    if options.sinks is not None:
      delta = (d_output.astype(f32) * output.astype(f32)).sum(-1)
      weights = jnp.exp(options.sinks.astype(f32) - top - log_total)
      d_sinks = -(weights * delta).sum(range(delta.ndim - 1))
      d_sinks = d_sinks.astype(options.sinks.dtype)
    return (
      d_query.astype(query.dtype),
      d_key.astype(key.dtype),
      d_value.astype(value.dtype),
      gradient_of_options(
        options, bias=ring.finish_bias_gradient(d_bias), sinks=d_sinks
      ),
    )


def _join(softmax, output, block_top, log_total):
  """Add a block's normalised output to (top, total, sum of values)."""
  top, total, values = softmax
  new_top = jnp.maximum(top, block_top)
  shrink = jnp.exp(top - new_top)
  # Fully masked rows of a block have an infinite denominator.
  weight = jnp.where(jnp.isinf(log_total), 0, jnp.exp(log_total))
  weight = weight * jnp.exp(block_top - new_top)
  values = values * shrink[..., None]
  values = values + output.astype(jnp.float32) * weight[..., None]
  return new_top, total * shrink + weight, values


@dataclasses.dataclass(frozen=True)
class _Ring:
  """The ring seen by one device, and the options of each block of keys."""

  options: object
  axis_name: object  # a mesh axis, or several
  is_striped: bool
  count: int  # devices
  num_query: int  # of a device
  num_key: int

  @classmethod
  def of(cls, implementation, query, key, options):
    name = implementation.axis_name
    return cls(
      options,
      name,
      implementation.is_striped,
      lax.axis_size(name),
      query.shape[-3],
      key.shape[-3],
    )

  @property
  def stride(self) -> int:
    return self.count if self.is_striped else 1

  @property
  def key_ids(self) -> tuple:
    """The ids of keys in masks of segments, which travel with the keys."""
    return tuple(
      jnp.asarray(c.key_ids)
      for c in self._conditions
      if isinstance(c, Segments)
    )

  @property
  def _conditions(self):
    return () if self.options.mask is None else self.options.mask.conditions

  def held(self, number):
    """The device whose keys this device holds at a step."""
    return (lax.axis_index(self.axis_name) - number) % self.count

  def send(self, blocks):
    """Pass blocks to the next device and receive those of the previous one."""
    ring = [(i, (i + 1) % self.count) for i in range(self.count)]
    send = functools.partial(lax.ppermute, axis_name=self.axis_name, perm=ring)
    return jax.tree.map(send, blocks)

  def _starts(self, held):
    """The first positions of this device's queries and of a block's keys."""
    own = lax.axis_index(self.axis_name)
    if self.is_striped:
      return own, held
    return own * self.num_query, held * self.num_key

  def options_of(self, held, ids):
    """The options of this device's queries and a device's keys."""
    options, ids = self.options, iter(ids)
    query, key = self._starts(held)

    def placed(condition):
      if isinstance(condition, Dense):
        return Dense(self._columns(condition.array, held))
      if isinstance(condition, Segments):
        return Segments(condition.query_ids, next(ids))
      return Placed(condition, query, key, self.stride)

    mask = None
    if options.mask is not None:
      mask = Mask(tuple(map(placed, self._conditions)))
    bias = options.bias
    if isinstance(bias, ArrayBias):
      bias = ArrayBias(self._columns(bias.array, held))
    elif bias is not None:
      bias = PlacedRelative(bias, key - query, self.stride)
    dropout = options.dropout
    if dropout is not None:
      dropout = dataclasses.replace(
        dropout, start=query, key_start=key, stride=self.stride
      )
    return dataclasses.replace(
      options, bias=bias, mask=mask, dropout=dropout, sinks=None
    )

  def is_visible(self, held):
    """Whether any of this device's queries may attend to a device's keys."""
    if self.is_striped:
      return True
    visible = jnp.bool_(True)
    query, key = self._starts(held)
    for condition in self._conditions:
      if isinstance(condition, Dense | Segments):
        continue
      low, high = condition.key_range(query, query + self.num_query - 1)
      if low is not None:
        visible &= jnp.min(low) <= key + self.num_key - 1
      if high is not None:
        visible &= jnp.max(high) >= key
    return visible

  def _columns(self, array, held):
    """The columns of an array that belong to a device's keys."""
    if array.shape[-1] == 1:
      return array
    array = jnp.asarray(array)
    if self.is_striped:
      array = array.reshape(*array.shape[:-1], self.num_key, self.count)
      return lax.dynamic_index_in_dim(array, held, -1, keepdims=False)
    start = held * self.num_key
    return lax.dynamic_slice_in_dim(array, start, self.num_key, -1)

  def zero_bias_gradient(self):
    bias = self.options.bias
    if isinstance(bias, ArrayBias):
      array = bias.array
      if array.shape[-1] == 1:
        return jnp.zeros(array.shape, jnp.float32)
      # Every column is written once.
      shape = (*array.shape[:-1], self.count, self.num_key)
      return jnp.zeros(shape, array.dtype)
    return None if bias is None else bias.zero_gradient()

  def add_bias_gradient(self, gradient, block, held):
    bias = self.options.bias
    if isinstance(bias, ArrayBias):
      if bias.array.shape[-1] == 1:
        return gradient + block.array.astype(jnp.float32)
      block = block.array[..., None, :]
      return lax.dynamic_update_slice_in_dim(gradient, block, held, -2)
    if bias is None:
      return None
    return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), gradient, block)

  def finish_bias_gradient(self, gradient):
    bias = self.options.bias
    if isinstance(bias, ArrayBias):
      if bias.array.shape[-1] > 1 and self.is_striped:
        gradient = jnp.swapaxes(gradient, -1, -2)
      gradient = gradient.reshape(bias.array.shape)
      return ArrayBias(gradient.astype(bias.array.dtype))
    return None if bias is None else bias.finish_gradient(gradient)
