"""Attention's pattern: the weights themselves, of chosen heads and queries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import batching, reference
from attention.ops.call import Call
from attention.ops.masks import LEAST, MASKED


def attention_weights(query, key, call: Call, heads, queries):
  """See `attention.attention_weights`; the arguments are checked already."""
  *batch, _, num_heads, _ = query.shape
  num_key, num_groups = key.shape[-3:-1]
  heads = np.asarray(heads)
  query = query[..., queries, :, :][..., heads, :]
  key = key[..., heads // (num_heads // num_groups), :]
  if call.vector is not None:
    call = dataclasses.replace(call, vector=call.vector[heads])
  x = batching.flatten(reference.products(query, key, call), 3) * call.scale
  if call.logit_cap is not None:
    x = call.logit_cap * jnp.tanh(x / call.logit_cap)

  rows = math.prod(batch)
  batch = tuple(batch)

  def per_query(tile):
    """Rows of a description, [rows or 1, heads or 1, queries, keys or 1]."""

    def row(number):
      part = tile(number)
      part = part.reshape((1,) * (4 - part.ndim) + part.shape)
      return (part[:, heads] if part.shape[1] > 1 else part)[:, :, 0]

    return jax.vmap(row, out_axes=2)(jnp.asarray(queries))

  if call.bias is not None:
    bias = call.bias
    x = x + per_query(lambda q: bias.tile(batch, 0, rows, q, 1, 0, num_key))
  if call.mask is not None:
    mask = call.mask.rows(batch, 0, rows)
    seen = per_query(lambda q: mask.tile(q, 1, 0, num_key))
    x = jnp.where(seen, x, MASKED)
  sinks = None if call.sinks is None else call.sinks[heads]
  seen = x >= LEAST
  pattern = reference.softmax(jnp.where(seen, x, MASKED), sinks)
  pattern = jnp.where(seen, pattern, 0)
  return pattern.reshape(*batch, *pattern.shape[1:])
