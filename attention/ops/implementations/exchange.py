"""Attention over positions that are cut over devices, after an exchange.

Each device sends a part of its shard to every other device, computes attention
on what it receives, and sends the results back. `Heads` gives each device all
positions of some heads (Jacobs et al. 2023, "DeepSpeed Ulysses"). `Striped`
gives it positions far from each other, so that a ring has the same causal work
everywhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops.biases import ArrayBias, Relative
from attention.ops.conditions import Band, Dense, Prefix, Segments
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
)
from attention.ops.masks import Mask


@dataclasses.dataclass(frozen=True)
class _Exchange(Implementation):
  """Attention that another implementation computes after an exchange.

  Arguments are one device's shards of contiguous positions.
  """

  axis_name: object  # a mesh axis, or several
  inner: Implementation

  def send(self, x, axis):
    """Exchange an array with positions at `axis`, followed by heads."""
    raise NotImplementedError

  def send_back(self, x, axis):
    """The inverse of `send`."""
    raise NotImplementedError

  def send_pairs(self, array):
    """Exchange an array [..., h, q, k] with this device's queries."""
    raise NotImplementedError

  def send_ids(self, ids):
    """Exchange this device's ids [..., t]."""
    raise NotImplementedError

  def of_heads(self, x):
    """Select from an array [..., h] what this device needs."""
    raise NotImplementedError

  def forward(self, query, key, value, options):
    axis = query.ndim - 3
    results = self.inner.forward(
      *(self.send(x, axis) for x in (query, key, value)),
      self._options(options)[0],
    )
    return tuple(self.send_back(x, axis) for x in results)

  def backward(self, query, key, value, options, *others):
    axis = query.ndim - 3
    sent, vjp = self._options(options)
    inputs, others = (
      [self.send(x, axis) for x in arrays]
      for arrays in ((query, key, value), others)
    )
    *gradients, d_options = self.inner.backward(*inputs, sent, *others)
    d_bias, d_sinks = vjp((d_options.bias, d_options.sinks))
    return (
      *(self.send_back(x, axis) for x in gradients),
      gradient_of_options(options, bias=d_bias, sinks=d_sinks),
    )

  def _options(self, options):
    """Return the exchanged options, and the vjp of their bias and sinks."""

    def send(bias, sinks):
      if isinstance(bias, Relative):
        bias = jax.tree.map(self.of_heads, bias)
      elif bias is not None:
        bias = ArrayBias(self.send_pairs(bias.array))
      return bias, None if sinks is None else self.of_heads(sinks)

    (bias, sinks), vjp = jax.vjp(send, options.bias, options.sinks)
    mask = options.mask
    if mask is not None:
      mask = Mask(tuple(map(self._condition, mask.conditions)))
    return dataclasses.replace(options, bias=bias, sinks=sinks, mask=mask), vjp

  def _condition(self, condition):
    if isinstance(condition, Dense):
      return Dense(self.send_pairs(jnp.asarray(condition.array)))
    if isinstance(condition, Segments):
      return jax.tree.map(lambda x: self.send_ids(jnp.asarray(x)), condition)
    return condition


@dataclasses.dataclass(frozen=True)
class Heads(_Exchange):
  """Each device gets all positions of its share of the heads."""

  num_heads: int = 1

  def refusal(self, query, key, value, options):
    """Return why heads can't be exchanged, or None; arguments are shards."""
    count = lax.axis_size(self.axis_name)
    heads, groups = query.shape[-2], key.shape[-2]
    if heads % count or groups % count:
      return (
        f'expected heads that {count} devices divide, got {heads} and {groups} '
        'for keys'
      )
    arrays = [] if options.mask is None else options.mask.arrays()
    if isinstance(options.bias, ArrayBias):
      arrays = [*arrays, options.bias.array]
    shape = heads, query.shape[-3]
    for array in arrays:
      if array.shape[-3:-1] != shape:
        return f'expected arrays [..., h, q, k] = {shape}, got {array.shape}'
    if options.dropout is not None:
      return 'dropout depends on the number of the head'
    if options.vector is not None:
      return 'additive similarity is not supported'

  def send(self, x, axis):
    return lax.all_to_all(x, self.axis_name, axis + 1, axis, tiled=True)

  def send_back(self, x, axis):
    return lax.all_to_all(x, self.axis_name, axis, axis + 1, tiled=True)

  def send_pairs(self, array):
    heads, queries = array.ndim - 3, array.ndim - 2
    return lax.all_to_all(array, self.axis_name, heads, queries, tiled=True)

  def send_ids(self, ids):
    return lax.all_gather(ids, self.axis_name, axis=ids.ndim - 1, tiled=True)

  def of_heads(self, x):
    if x.shape[-1] != self.num_heads:
      return x
    size = self.num_heads // lax.axis_size(self.axis_name)
    start = lax.axis_index(self.axis_name) * size
    return lax.dynamic_slice_in_dim(x, start, size, -1)


@dataclasses.dataclass(frozen=True)
class Striped(_Exchange):
  """Each device gets positions i, i + n, i + 2n, …, for a striped `Ring`."""

  @staticmethod
  def is_useful(query, key, options, count: int) -> bool:
    """Whether contiguous shards have uneven work that stripes would balance."""
    length = query.shape[-3]
    conditions = () if options.mask is None else options.mask.conditions
    grows = any(
      isinstance(c, Prefix)
      or (isinstance(c, Band) and c.low is None and c.high is not None)
      for c in conditions
    )
    return grows and length == key.shape[-3] and length % count == 0

  def send(self, x, axis):
    count = lax.axis_size(self.axis_name)
    shape = x.shape
    x = x.reshape(*shape[:axis], -1, count, *shape[axis + 1 :])
    x = x.swapaxes(axis, axis + 1).reshape(shape)
    return lax.all_to_all(x, self.axis_name, axis, axis, tiled=True)

  def send_back(self, x, axis):
    count = lax.axis_size(self.axis_name)
    shape = x.shape
    x = lax.all_to_all(x, self.axis_name, axis, axis, tiled=True)
    x = x.reshape(*shape[:axis], count, -1, *shape[axis + 1 :])
    return x.swapaxes(axis, axis + 1).reshape(shape)

  def send_pairs(self, array):
    return array if array.shape[-2] == 1 else self.send(array, array.ndim - 2)

  def send_ids(self, ids):
    return self.send(ids, ids.ndim - 1)

  def of_heads(self, x):
    return x
