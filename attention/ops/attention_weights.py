"""Attention weights of selected heads and queries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import batching
from attention.ops.arguments import check
from attention.ops.conditions import LEAST, MASKED
from attention.ops.implementations import reference


def attention_weights(query, key, *, heads=None, queries=None, **arguments):
  """softmax(query keyᵀ · scale + bias) for selected heads and queries.

  Only the selected rows are computed, even if the whole pattern would not fit
  in memory. Rows sum to 1, to less than 1 with sinks, and to 0 if fully masked.

  Args:
    query: [*b, q, h, d].
    key: [*b, k, g, d].
    heads: indices of the selected heads; all by default.
    queries: positions of the selected queries; all by default.
    **arguments: bias, mask, is_causal, scale, logit_cap and sinks of
      `dot_product_attention`; vector, for the weights of `additive_attention`.

  Returns:
    [*b, heads, queries, k] float32.

  Raises:
    ValueError: as `dot_product_attention`; a head or query is out of range.
  """
  query, key, _, options = check(query, key, key, **arguments)
  heads = select('heads', heads, query.shape[-2])
  queries = select('queries', queries, query.shape[-3])
  return _weights(query, key, options, heads, queries)


def _weights(query, key, options, heads, queries):
  *batch, _, num_heads, _ = query.shape
  num_key, num_groups = key.shape[-3:-1]
  heads = np.asarray(heads)
  query = query[..., queries, :, :][..., heads, :]
  key = key[..., heads // (num_heads // num_groups), :]
  if options.vector is not None:
    options = dataclasses.replace(options, vector=options.vector[heads])
  x = (
    batching.flatten(reference.products(query, key, options), 3) * options.scale
  )
  if options.logit_cap is not None:
    x = options.logit_cap * jnp.tanh(x / options.logit_cap)

  rows = math.prod(batch)
  batch = tuple(batch)

  def per_query(tile):
    """Selected rows of a bias or mask, from a function that returns one.

    Returns:
      [rows or 1, heads or 1, queries, keys or 1].
    """

    def row(number):
      part = tile(number)
      part = part.reshape((1,) * (4 - part.ndim) + part.shape)
      return (part[:, heads] if part.shape[1] > 1 else part)[:, :, 0]

    return jax.vmap(row, out_axes=2)(jnp.asarray(queries))

  if options.bias is not None:
    bias = options.bias
    x = x + per_query(lambda q: bias.tile(batch, 0, rows, q, 1, 0, num_key))
  if options.mask is not None:
    mask = options.mask.rows(batch, 0, rows)
    allowed = per_query(lambda q: mask.tile(q, 1, 0, num_key))
    x = jnp.where(allowed, x, MASKED)
  sinks = None if options.sinks is None else options.sinks[heads]
  allowed = x >= LEAST
  pattern = reference.softmax(jnp.where(allowed, x, MASKED), sinks)
  pattern = jnp.where(allowed, pattern, 0)
  return pattern.reshape(*batch, *pattern.shape[1:])


def weighted_values(weights, value):
  """[*b, h, q, k] and [*b, k, g, e] → [*b, q, h, e] float32."""
  value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
  value = value.astype(jnp.float32)
  return jnp.einsum('...hqk,...khe->...qhe', weights, value)


def select(name: str, numbers, count: int) -> np.ndarray:
  """Indices below `count`; all of them for None.

  Raises:
    ValueError: not ints, or an index that does not exist.
  """
  if numbers is None:
    return np.arange(count)
  chosen = np.atleast_1d(np.asarray(numbers))
  is_int = np.issubdtype(chosen.dtype, np.integer)
  if chosen.ndim != 1 or not is_int or not len(chosen):
    raise ValueError(f'{name}: expected ints, got {numbers!r}')
  wrong = chosen[(chosen < -count) | (chosen >= count)]
  if len(wrong):
    raise ValueError(f'{name}: expected 0 to {count - 1}, got {wrong.tolist()}')
  return chosen % count
