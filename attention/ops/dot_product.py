"""The one attention function: check, canonicalise, dispatch."""

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import chunked, reference, weights
from attention.ops.checks import check, check_float
from attention.ops.softmax import stable_softmax


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
      `relative_buckets`. A key with less than -5e29, such as -inf, is masked.
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
  query, key, value, call = check(
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
  return _dispatch(implementation, query, key, value, call)


def additive_attention(
  query, key, value, vector, *, implementation=None, **arguments
):
  """softmax(vectorᵀ tanh(query + key)) value (Bahdanau et al. 2015, A.1.2).

  Query and key are projected already; Luong et al. (2015) write the same as
  vᵀ tanh(W [query; key]), "concat".

  Args:
    query: [*b, q, h, d] float32, bfloat16 or float16.
    key: [*b, k, g, d], g dividing h.
    value: [*b, k, g, e].
    vector: [h, d].
    implementation: as in `dot_product_attention`.
    **arguments: bias, mask, is_causal, scale (1 by default), logit_cap, sinks,
      dropout_rate and dropout_rng of `dot_product_attention`.

  Returns:
    [*b, q, h, e] in the dtype of `query`.

  Raises:
    ValueError, NotImplementedError: as `dot_product_attention`.
  """
  vector = jnp.asarray(vector)
  checked = check(query, key, value, vector=vector, **arguments)
  return _dispatch(implementation, *checked)


def _dispatch(implementation, *checked):
  reasons = []
  for name in _names(implementation):
    try:
      return _IMPLEMENTATIONS[name](*checked)
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
      return _IMPLEMENTATIONS[name](*check(query, key, value, **arguments))

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
      `dot_product_attention`; vector, for the pattern of `additive_attention`.

  Returns:
    [*b, heads, queries, k] float32.

  Raises:
    ValueError: as `dot_product_attention`; a head or query that isn't there.
  """
  query, key, _, call = check(query, key, key, **arguments)
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
  check_float('x', x)
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
