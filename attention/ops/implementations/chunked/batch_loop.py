"""Attention a few rows of the batch at a time, their logits kept in cache.

For many short sequences. The softmax's sums are computed anew in the backward
pass, so nothing is saved but the inputs, and the gradient of a bias that the
rows share is summed up on the way.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import batching
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
  no_residuals,
)
from attention.ops.masks import LEAST, MASKED

# Logits in cache at once: XLA on CPU fuses the forward pass into one kernel,
# which is at its best at 8 MiB; the backward one, of several kernels, at 2 MiB.
_FORWARD_SIZE, _BACKWARD_SIZE = 2**21, 2**19
_MANY_KEYS = 256  # from here on XLA's sum over them costs more than a product
# Added to sums of exponentials, to divide by them: nothing beside the largest,
# which is 1.
_NOTHING = 1e-9


@dataclasses.dataclass(frozen=True)
class BatchLoop(Implementation):
  """Some rows of the batch at a time."""

  forward_size: int = _FORWARD_SIZE  # logits at once
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
  """Rows at a time: a divisor of all, with `size` logits or one row."""
  row = query.shape[-2] * query.shape[-3] * key.shape[-3]
  return _divisor(math.prod(query.shape[:-3]), size // row)


def _divisor(number, most):
  """The largest divisor that is not above `most`, or 1."""
  return max(
    n for n in range(1, max(1, min(most, number)) + 1) if not number % n
  )


def _products(query, key):
  """[r, q, h, c], [r, k, g, c] → [r, h, q, k] float32."""
  r, q, h, c = query.shape
  k, g = key.shape[1:3]
  if g == h:
    return jnp.einsum(
      'rqhc,rkhc->rhqk', query, key, preferred_element_type=jnp.float32
    )
  return jnp.einsum(
    'rqgpc,rkgc->rgpqk',
    query.reshape(r, q, g, -1, c),
    key,
    preferred_element_type=jnp.float32,
  ).reshape(r, h, q, k)


def _sum_keys(weights, value):
  """[r, h, q, k], [r, k, g, c] → [r, h, q, c] float32."""
  r, h, q, k = weights.shape
  g, c = value.shape[2:]
  weights = weights.astype(value.dtype)
  if g == h:
    return jnp.einsum(
      'rhqk,rkhc->rhqc', weights, value, preferred_element_type=jnp.float32
    )
  return jnp.einsum(
    'rgpqk,rkgc->rgpqc',
    weights.reshape(r, g, -1, q, k),
    value,
    preferred_element_type=jnp.float32,
  ).reshape(r, h, q, c)


def _sum_queries(weights, x, groups):
  """[r, h, q, k], [r, q, h, c] → [r, k, g, c] float32."""
  r, h, q, k = weights.shape
  return jnp.einsum(
    'rgpqk,rqgpc->rkgc',
    weights.reshape(r, groups, -1, q, k).astype(x.dtype),
    x.reshape(r, q, groups, h // groups, -1),
    preferred_element_type=jnp.float32,
  )


def _softmax(options, batch, row, query, key):
  """The softmax before its division.

  Returns:
    exp [r, h, q, k], all 0 for a query that sees nothing; its sums with the
    sink's [r, h, q], never 0; the sink's exponentials; the logits before the
    bias (where capped).
  """
  r, q = query.shape[:2]
  k = key.shape[1]
  if query.dtype == jnp.float32:
    x = _products(query * options.scale, key)  # the query is smaller
  else:  # where it would lose bits
    x = _products(query, key) * options.scale
  if options.logit_cap is not None:
    x = options.logit_cap * jnp.tanh(x / options.logit_cap)
  logits = x
  if options.bias is not None:
    logits = logits + options.bias.tile(batch, row, r, 0, q, 0, k)
  if options.mask is not None:
    mask = options.mask.rows(batch, row, r).tile(0, q, 0, k)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    # A sum, which XLA fuses with what comes after; a select it would not.
    logits = logits + jnp.where(mask, 0.0, MASKED)
  top = jnp.maximum(logits.max(-1), LEAST)
  if options.sinks is None:
    exp = jnp.exp(logits - top[..., None])
    return exp, exp.sum(-1) + _NOTHING, None, x
  sinks = options.sinks.astype(jnp.float32)[:, None]
  top = jnp.maximum(top, sinks)
  exp, sink_exp = jnp.exp(logits - top[..., None]), jnp.exp(sinks - top)
  return exp, exp.sum(-1) + sink_exp, sink_exp, x


def _factor(options, row, shape):
  r, h, q, k = shape
  rows = (row + jnp.arange(r))[:, None] * h + jnp.arange(h)
  return options.dropout.factor(rows, 0, q, 0, k)


def _row_step(options, batch, row, query, key, value):
  """The output of some rows, [r, q, h, e]."""
  exp, total, _, _ = _softmax(options, batch, row, query, key)
  if options.dropout is not None:
    exp = exp * _factor(options, row, exp.shape)
  output = _sum_keys(exp, value) / total[..., None]
  return output.swapaxes(1, 2).astype(query.dtype)


def _per_query(x):
  """[r, h, q] → [r, q, h, 1]."""
  return x.swapaxes(1, 2)[..., None]


def _row_gradients(options, batch, row, query, key, value, d_output):
  """Gradients of some rows' query, key and value, logits and sinks."""
  groups = key.shape[2]
  exp, total, sink_exp, x = _softmax(options, batch, row, query, key)
  # Barriers cut the work where XLA would compute things again for each reader,
  # or put all of it into one kernel that runs on one core.
  exp, total = lax.optimization_barrier((exp, total))
  inverse = 1 / total
  # The softmax's division goes to the output's gradient, which is smaller than
  # the weights (in float32: it would underflow in float16).
  d_output, used = _per_query(inverse) * d_output, exp
  if options.dropout is not None:
    factor = _factor(options, row, exp.shape)
    used = exp * factor
  d_weights = _products(d_output, value)
  if options.dropout is not None:
    d_weights = d_weights * factor
  if key.shape[1] < _MANY_KEYS:
    delta = (exp * d_weights).sum(-1) * inverse
  else:  # the same from the output (Dao et al. 2022), of which there is less
    output = _sum_keys(used, value).swapaxes(1, 2) * _per_query(inverse)
    delta = (d_output * output).sum(-1).swapaxes(1, 2)
  d_logits = exp * (d_weights - delta[..., None])
  d_products = d_logits = lax.optimization_barrier(d_logits)
  if options.logit_cap is not None:
    d_products = d_logits * (1 - jnp.square(x / options.logit_cap))
  d_value = _sum_queries(used, d_output, groups)
  d_query = _sum_keys(d_products, key).swapaxes(1, 2) * options.scale
  d_key = _sum_queries(d_products, query, groups) * options.scale
  grads = [
    g.astype(like.dtype)
    for g, like in ((d_query, query), (d_key, key), (d_value, value))
  ]
  d_sinks = None
  if sink_exp is not None:
    d_sinks = -(sink_exp * delta).sum((0, 2))
  return grads, d_logits, d_sinks


def _scan(step, carry, arrays, count, unroll=1):
  """Folds over row blocks; one block needs no loop, and its start is static."""
  total = len(arrays[0])
  if count == total:
    return step(carry, 0, *arrays)

  def body(carry, row):
    blocks = [lax.dynamic_slice_in_dim(x, row, count) for x in arrays]
    return step(carry, row, *blocks)

  starts = np.arange(0, total, count, dtype=np.int32)
  carry, blocks = lax.scan(body, carry, jnp.asarray(starts), unroll=unroll)
  return carry, jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), blocks)


def _backward(count, query, key, value, options, d_output):
  batch = query.shape[:-3]
  inputs = [batching.flatten(x, 3) for x in (query, key, value, d_output)]
  zero_bias = None if options.bias is None else options.bias.zero_gradient()
  zero_sinks = None
  if options.sinks is not None:
    zero_sinks = jnp.zeros(options.sinks.shape, jnp.float32)

  def step(carry, row, *inputs):
    d_bias, d_sinks = carry
    grads, d_logits, more = _row_gradients(options, batch, row, *inputs)
    if d_bias is not None:
      d_bias = options.bias.add_gradient(d_bias, d_logits, batch, row, 0, 0)
    if d_sinks is not None:
      d_sinks = d_sinks + more
    return (d_bias, d_sinks), grads

  # Two steps at once: kernels of one fill the gaps that the other leaves.
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
