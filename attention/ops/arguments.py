"""Validation of attention's arguments and conversion to canonical form."""

import math

import jax
import jax.numpy as jnp

from attention.ops.biases import ArrayBias, Bias
from attention.ops.dropout import Dropout, check_rate
from attention.ops.masks import Mask
from attention.ops.options import Options
from attention.ops.softmax import FLOATS


def check(
  query,
  key,
  value,
  *,
  bias=None,
  mask=None,
  is_causal=False,
  scale=None,
  logit_cap=None,
  sinks=None,
  dropout_rate=0.0,
  dropout_rng=None,
  vector=None,
  num_shards=1,
):
  """Check the arguments and return (query, key, value, `Options`).

  The keys are one of `num_shards` shards; arrays of the logits have all keys.

  Raises:
    ValueError: an argument doesn't fit; the message names it and reports what
      was expected and what was given.
  """
  query, key, value = _check_inputs(query, key, value)
  *batch, num_query, num_heads, size = query.shape
  num_key = num_shards * key.shape[-3]
  shape = (*batch, num_heads, num_query, num_key)

  if mask is not None and not isinstance(mask, Mask):
    mask = Mask.dense(mask)
  if mask is not None:
    mask.check(tuple(batch), num_query, key.shape[-3])
    for array in mask.arrays():
      check_broadcast('mask', array.shape, shape, short='[q, k]')
  if is_causal:
    causal = Mask.causal()
    mask = causal if mask is None else mask & causal

  if isinstance(bias, Bias):
    got = jax.eval_shape(lambda: bias.to_array(1, 1)).shape
    if got[-3:-2] not in ((1,), (num_heads,)):
      raise ValueError(
        f'bias: expected a bias for {num_heads} heads, got {got[-3]} heads'
      )
  elif bias is not None:
    bias = jnp.asarray(bias)
    check_float('bias', bias)
    check_broadcast('bias', bias.shape, shape, short='[h, q, k]')
    bias = ArrayBias(bias.reshape((1,) * (len(shape) - bias.ndim) + bias.shape))
  if sinks is not None:
    sinks = jnp.asarray(sinks)
    if sinks.shape != (num_heads,):
      raise ValueError(
        f'sinks: expected shape [h] = ({num_heads},), got {sinks.shape}'
      )
    check_float('sinks', sinks)
  if vector is not None:
    vector = jnp.asarray(vector)
    if vector.shape != (num_heads, size):
      raise ValueError(
        f'vector: expected shape [h, d] = {(num_heads, size)}, '
        f'got {vector.shape}'
      )
    check_float('vector', vector)
  if scale is None:
    scale = 1 / math.sqrt(size) if vector is None else 1.0
  if isinstance(scale, jax.core.Tracer) or not math.isfinite(scale):
    raise ValueError(
      f'scale: expected a finite constant, got {scale}; multiply the query '
      'by a learned scale instead'
    )
  if logit_cap is not None and (
    isinstance(logit_cap, jax.core.Tracer) or not 0 < logit_cap < math.inf
  ):
    raise ValueError(
      f'logit_cap: expected a positive, finite constant, got {logit_cap}'
    )
  check_rate(dropout_rate)
  dropout = None
  if dropout_rate:
    if dropout_rng is None:
      raise ValueError(
        f'dropout_rng: expected a key because dropout_rate={dropout_rate}, '
        'got None; pass dropout_rng=jax.random.key(seed)'
      )
    try:
      dropout = Dropout.create(dropout_rng, dropout_rate)
    except TypeError:
      raise ValueError(
        f'dropout_rng: expected a jax.random key, got {dropout_rng!r}'
      ) from None
  options = Options(
    bias=bias,
    mask=mask,
    sinks=sinks,
    dropout=dropout,
    vector=vector,
    scale=float(scale),
    logit_cap=None if logit_cap is None else float(logit_cap),
  )
  return query, key, value, options


def check_float(name, array):
  if array.dtype not in FLOATS:
    hint = '; pass booleans as mask=' if array.dtype == bool else ''
    raise ValueError(
      f'{name}: expected float32, bfloat16 or float16, got {array.dtype}{hint}'
    )


def _check_inputs(query, key, value):
  query, key, value = map(jnp.asarray, (query, key, value))
  arrays = {'query': query, 'key': key, 'value': value}
  for name, array in arrays.items():
    check_float(name, array)
  if query.ndim < 3:
    raise ValueError(f'query: expected [*b, q, h, d], got shape {query.shape}')
  for name, letters in (('key', 'k, g, d'), ('value', 'k, g, e')):
    array = arrays[name]
    if array.ndim != query.ndim:
      raise ValueError(
        f'{name}: expected [*b, {letters}] with the rank of query '
        f'({query.ndim}), got shape {array.shape}'
      )
    if array.shape[:-3] != query.shape[:-3]:
      raise ValueError(
        f'{name}: expected the leading axes of query {query.shape[:-3]}, '
        f'got {array.shape[:-3]}'
      )
  if key.shape[-1] != query.shape[-1]:
    raise ValueError(
      f'key: expected {query.shape[-1]} channels per head, as in query, '
      f'got {key.shape[-1]}'
    )
  if value.shape[-3] != key.shape[-3]:
    raise ValueError(
      f'value: expected {key.shape[-3]} positions, as in key, '
      f'got {value.shape[-3]}'
    )
  if value.shape[-2] != key.shape[-2]:
    raise ValueError(
      f'value: expected {key.shape[-2]} heads, as in key, got {value.shape[-2]}'
    )
  if not key.shape[-2] or query.shape[-2] % key.shape[-2]:
    raise ValueError(
      f"key: expected a number of heads that divides query's "
      f'{query.shape[-2]}, got {key.shape[-2]}'
    )
  return query, key, value


def check_broadcast(name, got, shape, short):
  """Raise ValueError unless a mask or bias broadcasts to the logits' shape.

  Its rank must be that of `short` or of the logits, so that no axis is
  ambiguous.
  """
  rank = len(shape)
  logits = f'the logits [*b, h, q, k] = {shape}'
  allowed = {len(short.split(',')), rank}
  if len(got) not in allowed:
    hint = f'; {name}[..., None, :, :] adds a head axis'
    raise ValueError(
      f'{name}: expected {short} or rank {rank}, broadcastable to {logits}, '
      f'got shape {got}' + (hint if len(got) == rank - 1 else '')
    )
  tail = shape[rank - len(got) :]
  if any(g not in (1, s) for g, s in zip(got, tail, strict=True)):
    raise ValueError(
      f'{name}: expected a shape broadcastable to {logits}, got {got}'
    )
