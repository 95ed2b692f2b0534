"""Attention by its formula, the einsum that all else is compared with."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.ops.conditions import LEAST, MASKED
from attention.ops.implementations import contractions
from attention.ops.implementations.base import Recomputing
from attention.ops.options import Options


def products(
  query: Float[Array, '*b q h d'],
  key: Float[Array, '*b k g d'],
  options: Options,
) -> Float[Array, '*b h q k']:
  """Compute similarities in float32: dot products or additive."""
  if options.vector is None:
    return contractions.products(query, key)
  *batch, num_query, num_heads, size = query.shape
  num_key, num_groups = key.shape[-3:-1]
  shared = num_heads // num_groups
  query = query.reshape(*batch, num_query, num_groups, shared, size)
  query, key = query.astype(jnp.float32), key.astype(jnp.float32)
  hidden = jnp.tanh(query[..., None, :, :, :] + key[..., None, :, :, None, :])
  vector = options.vector.reshape(num_groups, shared, size)
  x = jnp.einsum('...qkgrd,grd->...grqk', hidden, vector.astype(jnp.float32))
  return x.reshape(*batch, num_heads, num_query, num_key)


def logits(
  query: Float[Array, '*b q h d'],
  key: Float[Array, '*b k g d'],
  options: Options,
) -> Float[Array, '*b h q k']:
  """Compute scaled, capped, biased and masked logits in float32."""
  num_query, num_key = query.shape[-3], key.shape[-3]
  x = products(query, key, options) * options.scale
  if options.logit_cap is not None:
    x = options.logit_cap * jnp.tanh(x / options.logit_cap)
  if options.bias is not None:
    x = x + options.bias.to_array(num_query, num_key).astype(jnp.float32)
  if options.mask is not None:
    x = jnp.where(options.mask.to_array(num_query, num_key), x, MASKED)
  return x if options.bias is None else jnp.where(x < LEAST, MASKED, x)


def softmax(
  logits: Float[Array, '*b h q k'], sinks: Float[Array, 'h'] | None
) -> Float[Array, '*b h q k']:
  """Softmax over keys; with sinks, over keys and the head's sink."""
  if sinks is None:
    return jax.nn.softmax(logits)
  sinks = sinks.astype(jnp.float32)[:, None, None]
  top = logits.max(-1, keepdims=True, initial=-jnp.inf)
  top = jnp.maximum(top, sinks)
  top = jax.lax.stop_gradient(top)
  exp = jnp.exp(logits - top)
  return exp / (exp.sum(-1, keepdims=True) + jnp.exp(sinks - top))


def attention(
  query: Float[Array, '*b q h d'],
  key: Float[Array, '*b k g d'],
  value: Float[Array, '*b k g e'],
  options: Options,
) -> Float[Array, '*b q h e']:
  """softmax(query keyᵀ · scale + bias) value (Vaswani et al. 2017, eq. 1)."""
  *batch, num_query, num_heads, _ = query.shape
  num_key = key.shape[-3]
  x = logits(query, key, options)
  pattern = softmax(x, options.sinks)
  if options.dropout is not None:
    rows = jnp.arange(math.prod((*batch, num_heads)))
    pattern *= options.dropout.factor(
      rows.reshape(*batch, num_heads), 0, num_query, 0, num_key
    )
  output = jnp.swapaxes(contractions.sum_keys(pattern, value), -3, -2)
  if options.mask is not None or options.bias is not None:
    # Fully masked rows return zeros and have zero gradients.
    has_key = jnp.swapaxes((x != MASKED).any(-1), -1, -2)  # [*b, q, h]
    output = jnp.where(has_key[..., None], output, 0)
  return output.astype(query.dtype)


@dataclasses.dataclass(frozen=True)
class Reference(Recomputing):
  """The formula; a direct call supports higher-order derivatives."""

  def attend(self, query, key, value, options):
    return attention(query, key, value, options)

  def __call__(self, query, key, value, options):
    return attention(query, key, value, options)
