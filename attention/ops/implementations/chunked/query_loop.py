"""Attention over a chunk of queries at a time, for additive similarity.

Additive similarity computes d intermediate values per logit. They exist for one
chunk of queries at a time and are recomputed in the backward pass.
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

_SIZE = 2**20  # intermediate values per chunk, which has at least one query


@dataclasses.dataclass(frozen=True)
class QueryLoop(Recomputing):
  """Loop over chunks of queries."""

  size: int = _SIZE
  count: int | None = None  # queries per chunk; by default, from size

  def attend(self, query, key, value, options):
    return _attend(query, key, value, options, self.size, self.count)


def _attend(query, key, value, options, size, count):
  *batch, num_query, num_heads, channels = query.shape
  rows, num_key = math.prod(batch), key.shape[-3]
  per_query = rows * num_heads * num_key * channels
  count = min(count or max(1, size // per_query), num_query)
  # All chunks have the same size, so a ragged last one starts early.
  chunks = -(-num_query // count)
  starts = np.minimum(np.arange(chunks) * count, num_query - count)
  query, key, value = (batching.flatten(x, 3) for x in (query, key, value))

  shared = jax.tree.map(jnp.asarray, (key, value, options))
  # Keep the loop's inputs in float32, so that their gradients accumulate in
  # float32. Each chunk casts them back to their own dtypes.
  in_float32 = jax.tree.map(
    lambda x: (
      x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    shared,
  )

  @jax.checkpoint
  def attend(query, in_float32, start):
    key, value, options = jax.tree.map(
      lambda x, y: x.astype(y.dtype), in_float32, shared
    )
    options = options.at_queries(tuple(batch), rows, start, count, num_key)
    return reference.attention(query, key, value, options)

  def step(_, chunk):
    queries, start = chunk
    return None, attend(queries, in_float32, start)

  positions = starts[:, None] + np.arange(count)
  _, output = lax.scan(
    step,
    None,
    (jnp.moveaxis(query[:, positions], 1, 0), jnp.asarray(starts, jnp.int32)),
  )
  # [chunks, rows, count, h, e] → [*b, q, h, e]
  output = jnp.moveaxis(output, 0, 1)
  last = output[:, -1, chunks * count - num_query :]
  first = output[:, :-1].reshape(rows, -1, *output.shape[3:])
  output = jnp.concatenate([first, last], axis=1)
  return output.reshape(*batch, num_query, num_heads, -1)
