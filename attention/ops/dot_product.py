"""The one attention function: check, canonicalise, dispatch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import cudnn, reference, weights
from attention.ops.checks import check, check_float
from attention.ops.chunked import Chunked
from attention.ops.fused import Tpu, Triton
from attention.ops.implementation import (
  ByPlatform,
  Cut,
  Implementation,
  Refused,
)
from attention.ops.platforms import (
  CUT_FOR_TPUS,
  PLATFORMS,
  canonical,
  default_platform,
)
from attention.ops.softmax import stable_softmax


@dataclasses.dataclass(frozen=True)
class _Missing(Implementation):
  """No implementation of that name exists for the platform."""

  platform: str

  def refusal(self, *_):
    return f'no kernel for platform {self.platform!r}'


# Best first: the implementation of each platform; None stands for the others.
_IMPLEMENTATIONS = {
  'fused': {'cuda': Triton(), 'tpu': Tpu()},
  'chunked': {'cpu': Chunked(), None: Chunked(is_cpu=False)},
  'reference': {None: reference.Reference()},
  'cudnn': {'cuda': cudnn.Cudnn()},
}
_DEFAULT = ('fused', 'chunked', 'reference')


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
    implementation: a name ('fused', 'chunked', 'reference', 'cudnn'), names in
      order of preference, or None: the best for the platform that the program
      is lowered for, out of the first three.

  Returns:
    [*b, q, h, e] in the dtype of `query`.

  Raises:
    ValueError: arguments that don't fit; says which, what was expected, what
      came.
    NotImplementedError: no implementation that is named can compute the call;
      says why. Where that depends on the platform, it is raised when the
      program is lowered for that platform.
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
  names = _names(implementation)
  choices = {p: _choose(names, p, *checked) for p in (*PLATFORMS, CUT_FOR_TPUS)}
  chosen = set(choices.values())
  if all(isinstance(c, Refused) for c in chosen):
    raise NotImplementedError(choices[default_platform()].reason)
  if len(chosen) == 1:
    (only,) = chosen
    return only(*checked)
  return ByPlatform(
    tuple((p, c if 'tpu' in p else Cut(c)) for p, c in choices.items())
  )(*checked)


def _choose(names, platform, *checked):
  """The first implementation that can compute the call on the platform."""
  reasons = []
  for name in names:
    implementation = _find(name, platform)
    reason = implementation.refusal(*checked)
    if reason is None:
      return implementation
    reasons.append(f'{name}: {reason}')
  return Refused('; '.join(reasons))


def _find(name, platform):
  by_platform = _IMPLEMENTATIONS[name]
  missing = by_platform.get(None, _Missing(platform))
  return by_platform.get(platform, missing)


def explain(query, key, value, *, platform=None, **arguments) -> list:
  """Which implementation a call dispatches to, and why not to the others.

  Args:
    query: as in `dot_product_attention`, as are key, value and all other
      arguments; query, key and value may be `jax.ShapeDtypeStruct`s, as
      nothing is computed.
    key: see above.
    value: see above.
    platform: 'cpu', 'cuda', 'rocm' or 'tpu', whether it is here or not; by
      default that of this process.
    **arguments: see above.

  Returns:
    A list of (implementation, 'chosen', 'not needed' or why not).

  Raises:
    ValueError: as `dot_product_attention`; an unknown platform.
  """
  platform = canonical(platform) if platform else default_platform()
  names = _names(arguments.pop('implementation', None))
  found = []

  def visit(query, key, value):
    checked = check(query, key, value, **arguments)
    for name in names:
      if found and found[-1][1] in ('chosen', 'not needed'):
        found.append((name, 'not needed'))
      else:
        reason = _find(name, platform).refusal(*checked)
        found.append((name, reason or 'chosen'))

  jax.eval_shape(visit, query, key, value)
  return found


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
    return list(_DEFAULT)
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
