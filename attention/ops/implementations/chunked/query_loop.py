"""Attention some queries at a time, for similarities that are no product.

Additive similarity makes d numbers for every logit, which exist for few queries
at once, forward and (recomputed) backward.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import batching
from attention.ops.implementations import reference
from attention.ops.implementations.base import Recomputing

_SIZE = 2**20  # numbers that exist at once, if they are of one query at least


@dataclasses.dataclass(frozen=True)
class QueryLoop(Recomputing):
  """Some queries at a time."""

  size: int = _SIZE
  count: int | None = None  # queries at a time; chosen by shape

  def attend(self, query, key, value, options):
    return _attend(query, key, value, options, self.size, self.count)


def _attend(query, key, value, options, size, count):
  *batch, num_query, num_heads, channels = query.shape
  rows, num_key = math.prod(batch), key.shape[-3]
  each = rows * num_heads * num_key * channels
  count = min(count or max(1, size // each), num_query)
  # The last ones begin earlier if they are fewer, so that all have one size.
  blocks = -(-num_query // count)
  starts = np.minimum(np.arange(blocks) * count, num_query - count)
  query, key, value = (batching.flatten(x, 3) for x in (query, key, value))

  shared = jax.tree.map(jnp.asarray, (key, value, options))
  # In float32, so that their gradients are summed up in it; each block has them
  # in their own dtypes again.
  wide = jax.tree.map(
    lambda x: (
      x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    shared,
  )

  @jax.checkpoint
  def attend(query, wide, start):
    key, value, options = jax.tree.map(
      lambda x, y: x.astype(y.dtype), wide, shared
    )
    some = options.at_queries(tuple(batch), rows, start, count, num_key)
    return reference.attention(query, key, value, some)

  def step(_, block):
    some, start = block
    return None, attend(some, wide, start)

  chosen = starts[:, None] + np.arange(count)
  _, output = lax.scan(
    step,
    None,
    (jnp.moveaxis(query[:, chosen], 1, 0), jnp.asarray(starts, jnp.int32)),
  )
  # [blocks, rows, count, h, e] → [*b, q, h, e]
  output = jnp.moveaxis(output, 0, 1)
  last = output[:, -1, blocks * count - num_query :]
  first = output[:, :-1].reshape(rows, -1, *output.shape[3:])
  output = jnp.concatenate([first, last], axis=1)
  return output.reshape(*batch, num_query, num_heads, -1)
