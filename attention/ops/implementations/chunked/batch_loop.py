"""Attention over a chunk of batch rows at a time, with the logits in cache.

This loop suits many short sequences. The backward pass recomputes the softmax,
so the only residuals are the inputs, and accumulates the gradient of a bias
that batch rows share as it goes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import batching
from attention.ops.conditions import LEAST, MASKED
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
  no_residuals,
)
from attention.ops.implementations.contractions import (
  products,
  sum_keys,
  sum_queries,
)

# Logits per chunk. On CPU, XLA fuses the forward pass into one kernel, which is
# fastest at 8 MiB. The backward pass is several kernels, fastest at 2 MiB.
_FORWARD_SIZE, _BACKWARD_SIZE = 2**21, 2**19
_MANY_KEYS = 256  # from here on, XLA's sum over keys is slower than a matmul
# Added to the softmax's denominator so that it is never zero. It is negligible
# next to the largest exponential, which is 1.
_EPSILON = 1e-9


@dataclasses.dataclass(frozen=True)
class BatchLoop(Implementation):
  """Loop over chunks of batch rows."""

  forward_size: int = _FORWARD_SIZE  # logits per chunk
  backward_size: int = _BACKWARD_SIZE

  def forward(self, query, key, value, options):
    batch = query.shape[:-3]
    count = _count(query, key, self.forward_size)
    inputs = [batching.flatten(x, 3) for x in (query, key, value)]

    def step(_, row, *inputs):
      return None, _row_step(options, batch, row, *inputs)

    _, output = _scan(step, None, inputs, count)
    return output.reshape(*batch, *output.shape[1:]), *no_residuals(query)

  def backward(
    self, query, key, value, options, output, first, second, d_output
  ):
    del output, first, second
    count = _count(query, key, self.backward_size)
    *grads, d_options = _backward(count, query, key, value, options, d_output)
    grads = [
      g.reshape(x.shape)
      for g, x in zip(grads, (query, key, value), strict=True)
    ]
    return *grads, d_options


def _count(query, key, size):
  """Rows per chunk: a divisor of the batch, up to `size` logits or one row."""
  row = query.shape[-2] * query.shape[-3] * key.shape[-3]
  return _divisor(math.prod(query.shape[:-3]), size // row)


def _divisor(number, limit):
  """The largest divisor of `number` up to `limit`, or 1."""
  return max(
    n for n in range(1, max(1, min(limit, number)) + 1) if not number % n
  )


def _softmax(options, batch, row, query, key):
  """Compute the softmax up to, but not including, its division.

  Returns:
    A tuple of:
      the exponentials [r, h, q, k], all 0 in a fully masked row;
      the denominator [r, h, q], including the sinks and never 0;
      the exponentials of the sinks, or None without sinks;
      the logits after the cap and before the bias.
  """
  r, q = query.shape[:2]
  k = key.shape[1]
  if query.dtype == jnp.float32:
    x = products(query * options.scale, key)  # cheaper: it has fewer entries
  else:  # scaling the query in half precision would lose bits
    x = products(query, key) * options.scale
  if options.logit_cap is not None:
    x = options.logit_cap * jnp.tanh(x / options.logit_cap)
  logits = x
  if options.bias is not None:
    logits = logits + options.bias.tile(batch, row, r, 0, q, 0, k)
  if options.mask is not None:
    mask = options.mask.rows(batch, row, r).tile(0, q, 0, k)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    # Adding the mask fuses with the operations that follow; a select does not.
    logits = logits + jnp.where(mask, 0.0, MASKED)
  top = jnp.maximum(logits.max(-1), LEAST)
  if options.sinks is None:
    exp = jnp.exp(logits - top[..., None])
    return exp, exp.sum(-1) + _EPSILON, None, x
  sinks = options.sinks.astype(jnp.float32)[:, None]
  top = jnp.maximum(top, sinks)
  exp, sink_exp = jnp.exp(logits - top[..., None]), jnp.exp(sinks - top)
  return exp, exp.sum(-1) + sink_exp + _EPSILON, sink_exp, x


def _dropout_factor(options, row, shape):
  r, h, q, k = shape
  rows = (row + jnp.arange(r))[:, None] * h + jnp.arange(h)
  return options.dropout.factor(rows, 0, q, 0, k)


def _row_step(options, batch, row, query, key, value):
  """The output of a chunk of rows, [r, q, h, e]."""
  exp, total, _, _ = _softmax(options, batch, row, query, key)
  if options.dropout is not None:
    exp = exp * _dropout_factor(options, row, exp.shape)
  output = sum_keys(exp, value) / total[..., None]
  return output.swapaxes(1, 2).astype(query.dtype)


def _widened(x):
  return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _per_query(x):
  """[r, h, q] → [r, q, h, 1]."""
  return x.swapaxes(1, 2)[..., None]


def _row_gradients(options, batch, row, query, key, value, d_output):
  """Gradients of a chunk of rows: (query, key, value), logits and sinks."""
  groups = key.shape[2]
  exp, total, sink_exp, x = _softmax(options, batch, row, query, key)
  # Without these barriers, XLA recomputes values for each consumer, or fuses
  # everything into a single kernel that runs on one core.
  exp, total = lax.optimization_barrier((exp, total))
  inverse = 1 / total
  # Divide the output's gradient by the softmax's denominator, as it is smaller
  # than the weights. It is float32 here: it would underflow in float16.
  d_output, used = _per_query(inverse) * d_output, exp
  if options.dropout is not None:
    factor = _dropout_factor(options, row, exp.shape)
    used = exp * factor
  d_weights = products(d_output, value)
  if options.dropout is not None:
    d_weights = d_weights * factor
  if key.shape[1] < _MANY_KEYS:
    delta = (exp * d_weights).sum(-1) * inverse
  else:  # equal, from the smaller output (Dao et al. 2022)
    output = sum_keys(used, value).swapaxes(1, 2) * _per_query(inverse)
    delta = (d_output * output).sum(-1).swapaxes(1, 2)
  d_logits = exp * (d_weights - delta[..., None])
  d_products = d_logits = lax.optimization_barrier(d_logits)
  if options.logit_cap is not None:
    d_products = d_logits * (1 - jnp.square(x / options.logit_cap))
  d_value = sum_queries(used, d_output, groups)
  # The gradients of products would underflow in float16, too.
  of_keys = sum_keys(d_products, _widened(key)).swapaxes(1, 2)
  of_queries = sum_queries(d_products, _widened(query), groups)
  d_query, d_key = of_keys * options.scale, of_queries * options.scale
  grads = [
    g.astype(like.dtype)
    for g, like in ((d_query, query), (d_key, key), (d_value, value))
  ]
  d_sinks = None
  if sink_exp is not None:
    d_sinks = -(sink_exp * delta).sum((0, 2))
  return grads, d_logits, d_sinks


def _scan(step, carry, arrays, count, unroll=1):
  """Scan over chunks of rows; a single chunk runs unlooped, at a static row."""
  total = len(arrays[0])
  if count == total:
    return step(carry, 0, *arrays)

  def body(carry, row):
    chunks = [lax.dynamic_slice_in_dim(x, row, count) for x in arrays]
    return step(carry, row, *chunks)

  starts = np.arange(0, total, count, dtype=np.int32)
  carry, chunks = lax.scan(body, carry, jnp.asarray(starts), unroll=unroll)
  return carry, jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), chunks)


def _backward(count, query, key, value, options, d_output):
  batch = query.shape[:-3]
  inputs = [batching.flatten(x, 3) for x in (query, key, value, d_output)]
  zero_bias = None if options.bias is None else options.bias.zero_gradient()
  zero_sinks = None
  if options.sinks is not None:
    zero_sinks = jnp.zeros(options.sinks.shape, jnp.float32)

  def step(carry, row, *inputs):
    d_bias, d_sinks = carry
    grads, d_logits, d_chunk_sinks = _row_gradients(
      options, batch, row, *inputs
    )
    if d_bias is not None:
      d_bias = options.bias.add_gradient(d_bias, d_logits, batch, row, 0, 0)
    if d_sinks is not None:
      d_sinks = d_sinks + d_chunk_sinks
    return (d_bias, d_sinks), grads

  # Unroll by two, so that the kernels of one step fill the gaps in the other.
  (d_bias, d_sinks), grads = _scan(
    step,
    (zero_bias, zero_sinks),
    inputs,
    count,
    unroll=2,
  )
  if d_bias is not None:
    d_bias = options.bias.finish_gradient(d_bias)
  if d_sinks is not None:
    d_sinks = d_sinks.astype(options.sinks.dtype)
  return *grads, gradient_of_options(options, bias=d_bias, sinks=d_sinks)
