"""A tile of the logits inside a kernel: what is common to GPUs and TPUs."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from attention.ops.implementations.fused.operands import LOG2E, Distances
from attention.ops.masks import LEAST, MASKED, Dense, Segments


def both(one, two):
  """one & two, where None is no mask."""
  if one is None or two is None:
    return two if one is None else one
  return one & two


def dot(x, y, axes):
  """The product over an axis of each, in float32."""
  (i, j) = axes
  # Mosaic has no other precision of 16 bits, whatever JAX's default is.
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
  """Queries × keys, or keys × queries, of one head and row of the batch.

  Subclasses read the call's arrays from memory.
  """

  shape: object
  options: object  # Operands with references
  row: object
  head: object
  queries: object  # positions, [block, 1] or [1, block]
  keys: object
  is_whole: bool  # all queries see all keys, and all are there

  def logits(self, products):
    """(logits to base 2, d capped / d uncapped or None), float32."""
    options, slope = self.options, None
    if options.logit_cap is None:
      x = products * (options.scale * LOG2E)
    else:
      x = jnp.tanh(products * (options.scale / options.logit_cap))
      slope = 1 - x * x
      x = x * (options.logit_cap * LOG2E)
    if options.bias is not None:
      bias = options.bias
      is_distances = isinstance(bias, Distances)
      entries = self.distances(bias) if is_distances else self.entries(bias)
      x = x + entries.astype(jnp.float32) * LOG2E
    seen = None if self.is_whole else self._seen()
    if seen is not None:
      x = jnp.where(seen, x, MASKED * LOG2E)
    if options.bias is not None:  # a bias may mask: no slope, no NaN of -inf
      x = jnp.where(x < LEAST * LOG2E, MASKED * LOG2E, x)
    return x, slope

  def drop(self, weights):
    """Weights, or their gradients, times the factor of dropout."""
    dropout = self.options.dropout
    if dropout is None:
      return weights
    seed = dropout.seed[0], dropout.seed[1]
    dropout = dataclasses.replace(dropout, seed=seed, start=dropout.start[0])
    number = self.row * self.shape.heads + self.head
    kept = dropout.kept_at(number, self.queries, self.keys)
    return jnp.where(kept, weights * (1 / (1 - dropout.rate)), 0.0)

  def _seen(self):
    seen = None
    for condition in self.options.conditions:
      if isinstance(condition, Segments):
        of_queries, of_keys = self.ids(condition)
        more = of_queries == of_keys
      elif isinstance(condition, Dense):
        more = self.entries(condition.array) != 0
      else:
        more = self.numbers(condition).at(self.queries, self.keys)
      seen = both(seen, more)
    if self.shape.num_key % self.keys.size:
      seen = both(seen, self.keys < self.shape.num_key)
    return seen

  def entries(self, array):
    """Entries of an array [rows', h', q', k'], of the axes that it has."""
    raise NotImplementedError

  def distances(self, bias):
    """Entries of a bias by distance."""
    raise NotImplementedError

  def ids(self, condition):
    """The segments of (queries, keys)."""
    raise NotImplementedError

  def numbers(self, condition):
    """The condition of one row, with numbers in place of arrays."""
    raise NotImplementedError
