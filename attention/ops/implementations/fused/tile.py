"""A tile of the logits inside a kernel, shared by GPUs and TPUs."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from attention.ops.conditions import MASKED, Dense, Segments
from attention.ops.implementations.fused.operands import LOG2E, Distances


def combine(one, two):
  """The intersection of two masks, either of which may be None."""
  if one is None or two is None:
    return two if one is None else one
  return one & two


def dot(x, y, axes):
  """Contract one axis of each operand, accumulating in float32."""
  (i, j) = axes
  # For 16-bit operands Mosaic supports only this precision, whatever JAX's
  # default is.
  is_float32 = x.dtype == jnp.float32
  return lax.dot_general(
    x,
    y,
    (((i,), (j,)), ((), ())),
    precision=None if is_float32 else lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )


@dataclasses.dataclass(frozen=True)
class Tile:
  """A tile, queries × keys or keys × queries, of one head and batch row.

  Subclasses read the bias and mask arrays from memory.
  """

  shape: object
  options: object  # Operands with references
  row: object
  head: object
  queries: object  # positions, [block, 1] or [1, block]
  keys: object
  is_whole: bool  # no masked pairs and no padding

  def logits(self, products):
    """(base-2 logits, d capped / d uncapped or None), both float32."""
    options, slope = self.options, None
    factor = options.scale
    if options.logit_cap is not None:
      products = jnp.tanh(products * (options.scale / options.logit_cap))
      slope = 1 - products * products
      factor = options.logit_cap
    if options.bias is None:
      x = products * (factor * LOG2E)
    else:
      bias = options.bias
      is_distances = isinstance(bias, Distances)
      entries = self.distances(bias) if is_distances else self.entries(bias)
      entries = entries.astype(jnp.float32) * LOG2E
      x = self.multiply_add(products, factor * LOG2E, entries)
    allowed = None if self.is_whole else self._allowed()
    if allowed is not None:
      x = jnp.where(allowed, x, MASKED * LOG2E)
    return x, slope

  def drop(self, weights):
    """Apply dropout to attention weights or to their gradients."""
    dropout = self.options.dropout
    if dropout is None:
      return weights
    key_start = None if dropout.key_start is None else dropout.key_start[0]
    dropout = dataclasses.replace(
      dropout,
      seed=(dropout.seed[0], dropout.seed[1]),
      start=dropout.start[0],
      key_start=key_start,
    )
    number = self.row * self.shape.heads + self.head
    kept = dropout.kept_at(number, self.queries, self.keys)
    return jnp.where(kept, weights * (1 / (1 - dropout.rate)), 0.0)

  def _allowed(self):
    """Which pairs are neither masked nor padding; None if all."""
    allowed = None
    for condition in self.options.conditions:
      if isinstance(condition, Segments):
        of_queries, of_keys = self.ids(condition)
        new = of_queries == of_keys
      elif isinstance(condition, Dense):
        new = self.entries(condition.array) != 0
      else:
        new = self.scalars(condition).at(self.queries, self.keys)
      allowed = combine(allowed, new)
    if self.shape.num_key % self.keys.size:
      allowed = combine(allowed, self.keys < self.shape.num_key)
    return allowed

  def multiply_add(self, x, y, z):
    """x · y + z, where `y` and `z` broadcast to `x`."""
    return x * y + z

  def entries(self, array):
    """The tile's entries of an array [rows', h', q', k']; size-1 axes stay."""
    raise NotImplementedError

  def distances(self, bias):
    """The tile's entries of a bias by distance."""
    raise NotImplementedError

  def ids(self, condition):
    """The segment ids of (queries, keys)."""
    raise NotImplementedError

  def scalars(self, condition):
    """The condition for one batch row, with scalars in place of arrays."""
    raise NotImplementedError
