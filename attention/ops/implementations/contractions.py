"""The matrix products of attention, with query heads that share key heads.

All accumulate in float32. With as many key heads as query heads they are plain
batched products, which XLA on CPU computes faster than grouped ones.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def products(
  query: Float[Array, '*b q h d'], key: Float[Array, '*b k g d']
) -> Float[Array, '*b h q k']:
  """Dot products of queries and keys."""
  *b, q, h, d = query.shape
  k, g = key.shape[-3:-1]
  if g == h:
    return _einsum('...qhd,...khd->...hqk', query, key)
  # With a single axis of heads and queries, XLA on CPU reads the keys of a
  # cache as they lie, instead of transposing them.
  grouped = jnp.moveaxis(query, -3, -2).reshape(*b, g, h // g * q, d)
  return _einsum('...gxd,...kgd->...gxk', grouped, key).reshape(*b, h, q, k)


def sum_keys(
  weights: Float[Array, '*b h q k'], value: Float[Array, '*b k g e']
) -> Float[Array, '*b h q e']:
  """Weighted sums over keys."""
  *b, h, q, k = weights.shape
  g, e = value.shape[-2:]
  weights = weights.astype(value.dtype)
  if g == h:
    return _einsum('...hqk,...khe->...hqe', weights, value)
  grouped = weights.reshape(*b, g, h // g, q, k)
  return _einsum('...gpqk,...kge->...gpqe', grouped, value).reshape(*b, h, q, e)


def sum_queries(
  weights: Float[Array, '*b h q k'], x: Float[Array, '*b q h d'], groups: int
) -> Float[Array, '*b k g d']:
  """Weighted sums over queries, and over the heads that share a key head."""
  *b, h, q, k = weights.shape
  weights = weights.reshape(*b, groups, h // groups, q, k).astype(x.dtype)
  x = x.reshape(*b, q, groups, h // groups, -1)
  return _einsum('...gpqk,...qgpd->...kgd', weights, x)


def _einsum(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
