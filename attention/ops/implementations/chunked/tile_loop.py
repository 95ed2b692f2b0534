"""Attention in tiles of queries × keys, for few long sequences.

The softmax is accumulated online over key blocks (Milakov & Gimelshein 2018;
Dao et al. 2022). Fully masked tiles are skipped.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from attention.ops import batching
from attention.ops.conditions import LEAST, MASKED
from attention.ops.implementations.base import (
  Implementation,
  gradient_of_options,
)
from attention.ops.implementations.chunked.tiles import (
  Span,
  Tiles,
  find_spans,
)


@dataclasses.dataclass(frozen=True)
class TileLoop(Implementation):
  """Loop over tiles of queries × keys."""

  tiles: Tiles | None = None  # by default, chosen by shape

  def forward(self, query, key, value, options):
    *batch, num_query, num_heads, _ = query.shape
    plan = self._plan(query, key, options)
    flat = (batching.flatten(x, 3) for x in (query, key, value))
    return [
      x.reshape(*batch, num_query, num_heads, *x.shape[3:])
      for x in _forward(plan, *flat, options)
    ]

  def backward(
    self, query, key, value, options, output, top, log_total, d_output
  ):
    plan = self._plan(query, key, options)
    query_like, key_like, value_like = query, key, value
    query, key, value, output, d_output = (
      batching.flatten(x, 3) for x in (query, key, value, output, d_output)
    )
    top, log_total = (batching.flatten(x, 2) for x in (top, log_total))
    *grads, d_options = _backward(
      plan, query, key, value, options, output, top, log_total, d_output
    )
    likes = query_like, key_like, value_like
    grads = [g.reshape(x.shape) for g, x in zip(grads, likes, strict=True)]
    return *grads, d_options

  def _plan(self, query, key, options):
    *batch, num_query, num_heads, _ = query.shape
    num_key, num_groups = key.shape[-3:-1]
    tiles = self.tiles or Tiles.choose(num_heads, num_query, num_key)
    return _Plan(
      tuple(batch),
      num_query,
      num_key,
      num_groups,
      tiles,
      find_spans(options.mask, num_query, num_key, tiles),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Everything about the loops that is static under `jit`."""

  batch: tuple
  num_query: int
  num_key: int
  num_groups: int
  tiles: Tiles
  spans: tuple  # the `Span` of key blocks for each query block

  @property
  def row_starts(self):
    return np.arange(0, math.prod(self.batch), self.tiles.rows, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """The position of a tile; its starts may be traced.

  All blocks have the same size, so a ragged last one starts early and overlaps
  its predecessor. Overlapping positions are counted only once.
  """

  row: object
  query: object
  key: object
  new_key: object  # earlier keys belong to the previous block; None: no overlap
  is_whole: bool  # no query-key pair is masked


def _block(number, size, length):
  """A block's start, and its first position past the previous block's.

  The second is None if the block never overlaps its predecessor.
  """
  if length % size == 0:
    return number * size, None
  return jnp.minimum(number * size, length - size), number * size


def _take_queries(plan, start, *arrays):
  """Slice a query block from each array: [r, q, h, …] → [r, g, p, q, …]."""
  blocks = (
    batching.take_block(x, start, plan.tiles.queries, 1).swapaxes(1, 2)
    for x in arrays
  )
  return [x.reshape(len(x), plan.num_groups, -1, *x.shape[2:]) for x in blocks]


def _query_block(x, dtype):
  """Undo the layout of `_take_queries`: [r, g, p, q, …] → [r, q, h, …]."""
  return x.reshape(len(x), -1, *x.shape[3:]).swapaxes(1, 2).astype(dtype)


def _take_keys(plan, start, *arrays):
  """Slice a key block from each array: [r, k, g, c] → [r, g, k, c]."""
  blocks = (batching.take_block(x, start, plan.tiles.keys, 1) for x in arrays)
  return [x.swapaxes(1, 2) for x in blocks]


def _products(query, key):
  """[r, g, p, q, c], [r, g, k, c] → [r, g, p, q, k] float32.

  Tiles have heads beside the batch, so that a product reads contiguous rows;
  `contractions.products` would transpose every tile.
  """
  r, g, p, q, c = query.shape
  x = jnp.einsum(
    'rgqc,rgkc->rgqk',
    query.reshape(r, g, p * q, c),
    key,
    preferred_element_type=jnp.float32,
  )
  return x.reshape(r, g, p, q, -1)


def _sum_keys(weights, value):
  """[r, g, p, q, k], [r, g, k, c] → [r, g, p, q, c] float32."""
  r, g, p, q, k = weights.shape
  x = jnp.einsum(
    'rgqk,rgkc->rgqc',
    weights.reshape(r, g, p * q, k).astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  return x.reshape(r, g, p, q, -1)


def _logits(plan, options, query, key, tile):
  """A tile's logits, float32 [r, g, p, q, k], and those before the bias."""
  x = _products(query, key)
  r, g, _, q, k = x.shape
  x = x * options.scale
  capped = x
  if options.logit_cap is not None:
    capped = options.logit_cap * jnp.tanh(x / options.logit_cap)
  y = capped
  if options.bias is not None:
    y = y + _split_heads(
      options.bias.tile(plan.batch, tile.row, r, tile.query, q, tile.key, k), g
    )
  if tile.is_whole:
    return y, capped
  allowed = None
  if options.mask is not None:
    mask = options.mask.rows(plan.batch, tile.row, r)
    allowed = _split_heads(mask.tile(tile.query, q, tile.key, k), g)
  if tile.new_key is not None:
    is_new = tile.key + jnp.arange(k) >= tile.new_key
    allowed = is_new if allowed is None else allowed & is_new
  if allowed is not None:
    # Adding the mask fuses with the exponential; a select does not.
    y = y + jnp.where(allowed, 0.0, MASKED)
  return y, capped


def _split_heads(x, g):
  """[…, h or 1, q, k] → [r or 1, g or 1, h / g or 1, q, k] in float32."""
  x = x.reshape((1,) * (4 - x.ndim) + x.shape)
  groups = g if x.shape[1] > 1 else 1
  return x.reshape(x.shape[0], groups, -1, *x.shape[2:])


def _dropout_factor(plan, options, shape, tile):
  """Dropout's factors for a tile's attention weights, of the given shape."""
  r, g, p, q, k = shape
  rows = (tile.row + jnp.arange(r))[:, None] * (g * p) + jnp.arange(g * p)
  factor = options.dropout.factor(rows, tile.query, q, tile.key, k)
  return factor.reshape(shape)


def _update_softmax(plan, options, carry, query, key, value, tile):
  """Add a tile to the online softmax (top, total, weighted sum of values)."""
  old_top, total, values = carry
  logits, _ = _logits(plan, options, query, key, tile)
  top = jnp.maximum(old_top, logits.max(-1))
  shrink = jnp.exp(old_top - top)
  exp = jnp.exp(logits - top[..., None])
  total = total * shrink + exp.sum(-1)
  if options.dropout is not None:
    exp = exp * _dropout_factor(plan, options, exp.shape, tile)
  values = values * shrink[..., None] + _sum_keys(exp, value)
  return top, total, values


def _finish(options, top, total, values):
  """Return the output, and the log of the softmax's denominator as two terms.

  The terms are `top` and the remainder. They stay separate because a bias can
  push `top` to -1e9, where adding the remainder would round it away.
  """
  if options.sinks is not None:
    sinks = options.sinks.astype(jnp.float32).reshape(*top.shape[1:3], 1)
    total = total + jnp.exp(sinks - top)
  # An infinite denominator zeroes the weights of fully masked rows in both
  # passes.
  total = jnp.where(total > 0, total, jnp.inf)
  return values / total[..., None], top, jnp.log(total)


def _fold_keys(step, carry, plan, block):
  """Fold step(is_whole, number, carry) over the key blocks in the span."""
  span = Span(*np.array(plan.spans, np.int32).T)
  for first, last, is_whole in (
    (span.first, span.whole, False),
    (span.whole, span.rest, True),
    (span.rest, span.last, False),
  ):
    if len(first) == 1 and last - first == 1:
      carry = step(is_whole, int(first[0]), carry)
    elif (first < last).any():
      bounds = jnp.asarray(first)[block], jnp.asarray(last)[block]
      carry = lax.fori_loop(*bounds, functools.partial(step, is_whole), carry)
  return carry


def _fold(step, carry, starts):
  """Fold step(carry, start); a single step runs unlooped, at a static start."""
  if len(starts) == 1:
    return step(carry, int(starts[0]))
  starts = jnp.asarray(starts)
  return lax.scan(lambda *x: (step(*x), None), carry, starts)[0]


def _take_row_block(plan, start, *arrays):
  return [batching.take_block(x, start, plan.tiles.rows, 0) for x in arrays]


def _forward(plan, query, key, value, options):
  """The output [r, q, h, e], and the two terms of `_finish`, each [r, q, h]."""
  shape = query.shape[:-1]
  zeros = (
    jnp.zeros((*shape, value.shape[-1]), query.dtype),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )

  def row_step(carry, row):
    rows = _take_row_block(plan, row, query, key, value)

    def query_step(carry, number):
      start, _ = _block(number, plan.tiles.queries, plan.num_query)
      (q,) = _take_queries(plan, start, rows[0])

      def key_step(is_whole, number, carry):
        at, new_key = _block(number, plan.tiles.keys, plan.num_key)
        k, v = _take_keys(plan, at, *rows[1:])
        tile = _Tile(row, start, at, new_key, is_whole)
        return _update_softmax(plan, options, carry, q, k, v, tile)

      top = jnp.full(q.shape[:-1], LEAST)
      values = jnp.zeros((*top.shape, value.shape[-1]))
      softmax = (top, jnp.zeros_like(top), values)
      blocks = _finish(options, *_fold_keys(key_step, softmax, plan, number))
      # Overlapping queries are written twice, with identical values.
      return tuple(
        batching.put_block(whole, _query_block(x, whole.dtype), (row, start))
        for whole, x in zip(carry, blocks, strict=True)
      )

    return _fold(query_step, carry, range(len(plan.spans)))

  return _fold(row_step, zeros, plan.row_starts)


def _backward(
  plan, query, key, value, options, output, top, log_total, d_output
):
  f32 = jnp.float32
  # Each query's Σ weight · d_weight, from its output (Dao et al. 2022).
  delta = (d_output.astype(f32) * output.astype(f32)).sum(-1)

  def row_step(carry, row):
    all_k, all_v, *per_query = _take_row_block(
      plan, row, key, value, query, d_output, top, log_total, delta
    )

    def query_step(carry, number):
      start, new_query = _block(number, plan.tiles.queries, plan.num_query)
      q, d_out, *softmax = _take_queries(plan, start, *per_query)
      # Put the queries last in operands contracted over queries. Without the
      # barrier, XLA undoes the transpose and CPUs use a slower matmul.
      q_t, d_out_t = lax.optimization_barrier(
        tuple(jnp.moveaxis(x, -1, 2) for x in (q, d_out))
      )
      if new_query is not None:
        # Zero the weights of queries that belong to the previous block.
        is_new = start + jnp.arange(plan.tiles.queries) >= new_query
        softmax[1] = jnp.where(is_new, softmax[1], jnp.inf)

      def key_step(is_whole, number, carry):
        dq, dk, dv, d_bias = carry
        at, new_key = _block(number, plan.tiles.keys, plan.num_key)
        k, v = _take_keys(plan, at, all_k, all_v)
        tile = _Tile(row, start, at, new_key, is_whole)
        used, d_logits, d_products = _tile_gradients(
          plan, options, q, k, v, d_out, *softmax, tile
        )
        d_block = options.scale * _sum_queries(d_products, q_t)
        dk = batching.add_block(dk, d_block, (0, at))
        dv = batching.add_block(dv, _sum_queries(used, d_out_t), (0, at))
        if options.bias is not None:
          flat = d_logits.reshape(len(d_logits), -1, *d_logits.shape[3:])
          d_bias = options.bias.add_gradient(
            d_bias, flat, plan.batch, row, start, at
          )
        return dq + _sum_keys(d_products, k), dk, dv, d_bias

      dq, *carry = carry
      carry = (jnp.zeros(q.shape, f32), *carry)
      d_block, *carry = _fold_keys(key_step, carry, plan, number)
      d_block = _query_block(options.scale * d_block, dq.dtype)
      return batching.add_block(dq, d_block, (row, start)), *carry

    dq, dk, dv, d_bias = carry
    zeros = [jnp.zeros(x.shape, f32) for x in (all_k, all_v)]
    blocks = range(len(plan.spans))
    dq, *d_row, d_bias = _fold(query_step, (dq, *zeros, d_bias), blocks)
    dk, dv = (
      batching.put_block(whole, x.astype(whole.dtype), (row,))
      for whole, x in zip((dk, dv), d_row, strict=True)
    )
    return dq, dk, dv, d_bias

  zeros = [jnp.zeros_like(x) for x in (query, key, value)]
  d_bias = None if options.bias is None else options.bias.zero_gradient()
  dq, dk, dv, d_bias = _fold(row_step, (*zeros, d_bias), plan.row_starts)
  if options.bias is not None:
    d_bias = options.bias.finish_gradient(d_bias)
  d_sinks = None
  if options.sinks is not None:
    weights = jnp.exp(options.sinks.astype(f32) - top - log_total)
    d_sinks = -(weights * delta).sum((0, 1)).astype(options.sinks.dtype)
  return dq, dk, dv, gradient_of_options(options, bias=d_bias, sinks=d_sinks)


def _tile_gradients(plan, options, q, k, v, d_out, top, log_total, delta, tile):
  """A tile's weights after dropout, and gradients of its logits and products.

  The products' gradient is with respect to the scaled products.
  """
  logits, capped = _logits(plan, options, q, k, tile)
  weights = jnp.exp(logits - top[..., None] - log_total[..., None])
  d_weights = _products(d_out, v)
  used = weights
  if options.dropout is not None:
    factor = _dropout_factor(plan, options, weights.shape, tile)
    used, d_weights = weights * factor, d_weights * factor
  d_products = d_logits = weights * (d_weights - delta[..., None])
  if options.logit_cap is not None:
    d_products = d_logits * (1 - jnp.square(capped / options.logit_cap))
  return used, d_logits, d_products


def _sum_queries(weights, x):
  """Contract queries and shared heads: [r, g, c, p, q] → [r, k, g, c]."""
  r, g, p, q, k = weights.shape
  sums = jnp.einsum(
    'rgcq,rgqk->rgck',
    x.reshape(r, g, -1, p * q),
    weights.reshape(r, g, p * q, k).astype(x.dtype),
    preferred_element_type=jnp.float32,
  )
  return sums.transpose(0, 3, 1, 2)
