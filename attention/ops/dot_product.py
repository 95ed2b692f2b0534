"""The one attention function: check, canonicalise, dispatch."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import chunked, reference, weights
from attention.ops.biases import ArrayBias, Bias
from attention.ops.call import Call
from attention.ops.dropout import Dropout
from attention.ops.masks import Mask
from attention.ops.softmax import FLOATS, stable_softmax


def _fused(query, key, value, call):
  raise NotImplementedError(
    f'no fused kernel for platform {jax.default_backend()!r} yet'
  )


# Best first. Each takes (query, key, value, call), all checked, and raises
# NotImplementedError with the reason if it doesn't serve the call.
_IMPLEMENTATIONS = {
  'fused': _fused,
  'chunked': chunked.attention,
  'reference': reference.attention,
}


def dot_product_attention(
  query,
  key,
  value,
  *,
  bias=None,
  mask=None,
  is_causal: bool = False,
  scale: float | None = None,
  logit_cap: float | None = None,
  sinks=None,
  dropout_rate: float = 0.0,
  dropout_rng=None,
  implementation=None,
):
  """softmax(query keyᵀ · scale + bias) value (Vaswani et al. 2017, eq. 1).

  The softmax and all sums are in float32. A query that may see no key returns
  zeros and passes no gradient on.

  Args:
    query: [*b, q, h, d]; float32, bfloat16 or float16.
    key: [*b, k, g, d]; g divides h: each key head serves h / g query heads.
    value: [*b, k, g, e].
    bias: added to the logits: [h, q, k], or of the logits' rank and
      broadcastable to [*b, h, q, k]; or a description: `alibi`,
      `relative_buckets`.
    mask: True = may attend: a `Mask`, or a boolean array, [q, k] or of the
      logits' rank and broadcastable to [*b, h, q, k].
    is_causal: query i sees keys j <= i; joined with `mask` by AND.
    scale: factor of the logits; 1/√d by default.
    logit_cap: c · tanh(logits / c), before bias and mask.
    sinks: [h], an extra logit a head that takes weight and gives no value
      (OpenAI 2025, gpt-oss model card).
    dropout_rate: probability of dropping a weight, in [0, 1).
    dropout_rng: a key of `jax.random`; needed if dropout_rate > 0.
    implementation: a name ('chunked', 'reference', 'fused'), names in order
      of preference, or None: the best that serves the call.

  Returns:
    [*b, q, h, e] in the dtype of `query`.

  Raises:
    ValueError: arguments that don't fit; says which, what was expected, what
      came.
    NotImplementedError: an implementation asked for by name doesn't serve the
      call; says why.
  """
  query, key, value, call = _check(
    query,
    key,
    value,
    bias=bias,
    mask=mask,
    is_causal=is_causal,
    scale=scale,
    logit_cap=logit_cap,
    sinks=sinks,
    dropout_rate=dropout_rate,
    dropout_rng=dropout_rng,
  )
  reasons = []
  for name in _names(implementation):
    try:
      return _IMPLEMENTATIONS[name](query, key, value, call)
    except NotImplementedError as reason:
      reasons.append(f'{name}: {reason}')
  raise NotImplementedError('; '.join(reasons))


def explain(query, key, value, **arguments) -> list:
  """Which implementation serves a call, and why not the others.

  Takes the arguments of `dot_product_attention`, of which query, key and value
  may be `jax.ShapeDtypeStruct`s; computes nothing.

  Returns:
    A list of (implementation, 'chosen', 'not needed' or why not).

  Raises:
    ValueError: as `dot_product_attention`.
  """
  implementation = arguments.pop('implementation', None)
  told = []
  for name in _names(implementation):
    if told and told[-1][1] in ('chosen', 'not needed'):
      told.append((name, 'not needed'))
      continue

    def call(query, key, value, name=name):
      return _IMPLEMENTATIONS[name](*_check(query, key, value, **arguments))

    try:
      jax.eval_shape(call, query, key, value)
      told.append((name, 'chosen'))
    except NotImplementedError as reason:
      told.append((name, str(reason)))
  return told


def attention_weights(query, key, *, heads=None, queries=None, **arguments):
  """softmax(query keyᵀ · scale + bias): the pattern, of some heads and queries.

  Only what is asked for is computed: rows of a pattern too large to hold. Rows
  sum to 1; to less with sinks; to 0 where a query may see no key.

  Args:
    query: [*b, q, h, d].
    key: [*b, k, g, d].
    heads: numbers of the heads wanted; all by default.
    queries: positions of the queries wanted; all by default.
    **arguments: bias, mask, is_causal, scale, logit_cap and sinks of
      `dot_product_attention`.

  Returns:
    [*b, heads, queries, k] float32.

  Raises:
    ValueError: as `dot_product_attention`; a head or query that isn't there.
  """
  query, key, _, call = _check(query, key, key, **arguments)
  heads = _select('heads', heads, query.shape[-2])
  queries = _select('queries', queries, query.shape[-3])
  return weights.attention_weights(query, key, call, heads, queries)


def _select(name, numbers, count):
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


def self_attention(x):
  """softmax(x xᵀ) x: attention in its basic form, without parameters.

  Args:
    x: [*b, t, m] float32, bfloat16 or float16.

  Returns:
    [*b, t, m]: each row a mean of the rows it resembles.

  Raises:
    ValueError: fewer than two axes, or another dtype.
  """
  x = jnp.asarray(x)
  if x.ndim < 2:
    raise ValueError(f'x: expected [*b, t, m], got shape {x.shape}')
  _check_float('x', x)
  pattern = stable_softmax(jnp.einsum('...qm,...km->...qk', x, x))
  return jnp.einsum('...qk,...km->...qm', pattern, x)


def _names(implementation):
  if implementation is None:
    return list(_IMPLEMENTATIONS)
  names = (
    [implementation]
    if isinstance(implementation, str)
    else list(implementation)
  )
  for name in names:
    if name not in _IMPLEMENTATIONS:
      raise ValueError(
        f'implementation: expected one of {sorted(_IMPLEMENTATIONS)}, '
        f'got {name!r}'
      )
  if not names:
    raise ValueError('implementation: expected at least one name, got none')
  return names


def _check(
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
):
  """The arguments in canonical form: arrays, and a `Call` for the rest."""
  query, key, value = _check_inputs(query, key, value)
  *batch, num_query, num_heads, size = query.shape
  shape = (*batch, num_heads, num_query, key.shape[-3])

  if mask is not None and not isinstance(mask, Mask):
    mask = Mask.dense(mask)
  if mask is not None:
    for array in mask.arrays():
      _check_broadcast('mask', array.shape, shape, short='[q, k]')
  if is_causal:
    causal = Mask.causal()
    mask = causal if mask is None else mask & causal

  if isinstance(bias, Bias):
    got = jax.eval_shape(lambda: bias.to_array(1, 1)).shape
    if got[-3:-2] not in ((1,), (num_heads,)):
      raise ValueError(
        f'bias: expected one for {num_heads} heads, got one for {got[-3]}'
      )
  elif bias is not None:
    bias = jnp.asarray(bias)
    _check_float('bias', bias)
    _check_broadcast('bias', bias.shape, shape, short='[h, q, k]')
    bias = ArrayBias(bias.reshape((1,) * (len(shape) - bias.ndim) + bias.shape))
  if sinks is not None:
    sinks = jnp.asarray(sinks)
    if sinks.shape != (num_heads,):
      raise ValueError(
        f'sinks: expected shape [h] = ({num_heads},), got {sinks.shape}'
      )
    _check_float('sinks', sinks)
  if logit_cap is not None and not logit_cap > 0:
    raise ValueError(f'logit_cap: expected a positive number, got {logit_cap}')
  if not 0 <= dropout_rate < 1:
    raise ValueError(f'dropout_rate: expected [0, 1), got {dropout_rate}')
  dropout = None
  if dropout_rate:
    if dropout_rng is None:
      raise ValueError(
        f'dropout_rng: expected a key, as dropout_rate={dropout_rate}, '
        'got None; pass dropout_rng=jax.random.key(seed)'
      )
    dropout = Dropout.create(dropout_rng, dropout_rate)
  call = Call(
    bias=bias,
    mask=mask,
    sinks=sinks,
    dropout=dropout,
    scale=1 / math.sqrt(size) if scale is None else float(scale),
    logit_cap=None if logit_cap is None else float(logit_cap),
  )
  return query, key, value, call


def _check_float(name, array):
  if array.dtype not in FLOATS:
    hint = ' (booleans go to mask=)' if array.dtype == bool else ''
    raise ValueError(
      f'{name}: expected float32, bfloat16 or float16, got {array.dtype}{hint}'
    )


def _check_inputs(query, key, value):
  query, key, value = map(jnp.asarray, (query, key, value))
  arrays = {'query': query, 'key': key, 'value': value}
  for name, array in arrays.items():
    _check_float(name, array)
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
      f'key: expected {query.shape[-1]} channels per head, as query has, '
      f'got {key.shape[-1]}'
    )
  if value.shape[-3] != key.shape[-3]:
    raise ValueError(
      f'value: expected {key.shape[-3]} positions, as key has, '
      f'got {value.shape[-3]}'
    )
  if value.shape[-2] != key.shape[-2]:
    raise ValueError(
      f'value: expected {key.shape[-2]} heads, as key has, '
      f'got {value.shape[-2]}'
    )
  if query.shape[-2] % key.shape[-2]:
    raise ValueError(
      f"key: expected a number of heads that divides query's "
      f'{query.shape[-2]}, got {key.shape[-2]}'
    )
  return query, key, value


def _check_broadcast(name, got, shape, short):
  """A mask or bias fits the logits' shape, and could not mean another axis."""
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
