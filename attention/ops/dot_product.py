"""Attention: the public functions over arrays."""

import jax
import jax.numpy as jnp

from attention.ops.arguments import check, check_float
from attention.ops.implementations.dispatch import dispatch, find, names_of
from attention.ops.platforms import canonical, default_platform
from attention.ops.softmax import stable_softmax


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
  query, key, value, options = check(
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
  return dispatch(implementation, query, key, value, options)


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
  return dispatch(implementation, *checked)


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
  names = names_of(arguments.pop('implementation', None))
  found = []

  def visit(query, key, value):
    checked = check(query, key, value, **arguments)
    for name in names:
      if found and found[-1][1] in ('chosen', 'not needed'):
        found.append((name, 'not needed'))
      else:
        reason = find(name, platform).refusal(*checked)
        found.append((name, reason or 'chosen'))

  jax.eval_shape(visit, query, key, value)
  return found


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
