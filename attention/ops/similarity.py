"""Similarities of queries and keys, expressed as scaled dot products.

Each function takes query [*b, q, h, d] and key [*b, k, g, d] and returns
(query, key, scale) for `dot_product_attention`: the dot product of this query
and key, times the scale, is the similarity. Additive similarity is not a dot
product; see `additive_attention`.
"""

import math

import jax.numpy as jnp
from jax import lax


def scaled_dot(query, key):
  """query · key / √d (Vaswani et al. 2017, section 3.2.1)."""
  return query, key, 1 / math.sqrt(query.shape[-1])


def dot(query, key):
  """query · key (Luong et al. 2015, section 3.1, "dot")."""
  return query, key, 1.0


def cosine(query, key):
  """query · key / (|query| |key|): the cosine of their angle, in [-1, 1]."""
  return _unit(query), _unit(key), 1.0


def general(query, key, weight):
  """queryᵀ weight key (Luong et al. 2015, section 3.1, "general").

  Args:
    query: [*b, q, h, c].
    key: [*b, k, g, d].
    weight: [h, c, d]; query and key may have different numbers of channels.

  Returns:
    (query [*b, q, h, d], key, 1.0).

  Raises:
    ValueError: the weight has another shape.
  """
  expected = (*query.shape[-2:], key.shape[-1])
  if weight.shape != expected:
    raise ValueError(
      f'weight: expected shape [h, c, d] = {expected}, got {weight.shape}'
    )
  return jnp.einsum('...qhc,hcd->...qhd', query, weight), key, 1.0


def _unit(x):
  """Normalise the last axis to length 1; zeros stay, with zero gradients."""
  exact = x.astype(jnp.float32)
  squares = jnp.square(exact).sum(-1, keepdims=True)
  return (exact * lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(x.dtype)
