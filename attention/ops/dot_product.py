"""Public attention functions on arrays."""

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

  The softmax and all sums are in float32. Fully masked rows return zeros and
  have zero gradients.

  Args:
    query: [*b, q, h, d]; float32, bfloat16 or float16.
    key: [*b, k, g, d]; g divides h, and h / g query heads share a key head.
    value: [*b, k, g, e].
    bias: added to the logits: an array [h, q, k], or one of the logits' rank
      that broadcasts to [*b, h, q, k]; or an `alibi` or `relative_buckets`
      bias. Keys with a bias below -5e29, such as -inf, are masked.
    mask: a `Mask`, or a boolean array (True = may attend), [q, k] or of the
      logits' rank and broadcastable to [*b, h, q, k].
    is_causal: whether query i attends only to keys j <= i, in addition to
      `mask`.
    scale: factor of the logits; 1/√d by default.
    logit_cap: c, to cap logits by c · tanh(logits / c) before bias and mask.
    sinks: [h], an extra logit per head that takes weight but has no value
      (OpenAI 2025, gpt-oss model card).
    dropout_rate: probability of dropping a weight, in [0, 1).
    dropout_rng: a `jax.random` key; required if dropout_rate > 0.
    implementation: a name ('fused', 'chunked', 'reference' or 'cudnn'), names
      in order of preference, or None for the best of the first three on the
      platform that the program is lowered for.

  Returns:
    [*b, q, h, e] in the dtype of `query`.

  Raises:
    ValueError: an argument doesn't fit; the message names it and reports what
      was expected and what was given.
    NotImplementedError: no named implementation supports the arguments; the
      message gives the reasons. If this depends on the platform, the error is
      raised when the program is lowered for that platform.
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

  Query and key are already projected. Luong et al. (2015) write the same
  similarity as vᵀ tanh(W [query; key]), "concat".

  Args:
    query: [*b, q, h, d] float32, bfloat16 or float16.
    key: [*b, k, g, d]; g divides h.
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
  """Report which implementation a call dispatches to, and why not to others.

  Nothing is computed, so query, key and value may be `jax.ShapeDtypeStruct`s.

  Args:
    query: as in `dot_product_attention`.
    key: as in `dot_product_attention`.
    value: as in `dot_product_attention`.
    platform: 'cpu', 'cuda', 'rocm' or 'tpu', which need not be attached; by
      default that of this process.
    **arguments: as in `dot_product_attention`.

  Returns:
    A list of pairs (implementation, status): 'chosen', 'not needed' or the
    reason why the implementation can't be used.

  Raises:
    ValueError: as `dot_product_attention`; the platform is unknown.
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
  """softmax(x xᵀ) x: basic self-attention, without parameters.

  Args:
    x: [*b, t, m] float32, bfloat16 or float16.

  Returns:
    [*b, t, m]: each row is a mean of all rows, weighted by similarity.

  Raises:
    ValueError: `x` has fewer than two axes or another dtype.
  """
  x = jnp.asarray(x)
  if x.ndim < 2:
    raise ValueError(f'x: expected [*b, t, m], got shape {x.shape}')
  check_float('x', x)
  pattern = stable_softmax(jnp.einsum('...qm,...km->...qk', x, x))
  return jnp.einsum('...qk,...km->...qm', pattern, x)
