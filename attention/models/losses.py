"""Loss functions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_cross_entropy(
  logits: Float[Array, '*b v'],
  targets: Int[Array, '*b'],
  label_smoothing: float = 0.0,
) -> Float[Array, '*b']:
  """Negative log-likelihood of each target, in nats.

  Args:
    logits: unnormalised log-probabilities.
    targets: token ids, in [0, v).
    label_smoothing: the share of a target's probability that is spread over
      the vocabulary (Szegedy et al. 2016, section 7).
  """
  logits = logits.astype(jnp.float32)
  # The gradient of indexing would add a float32 array of zeros to the softmax's
  # gradient; this select fuses into the kernel that computes it.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  picked = jnp.where(is_target, logits, 0).sum(-1)
  if label_smoothing:
    picked += label_smoothing * (logits.mean(-1) - picked)
  return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy(
  logits: Float[Array, '*b v'],
  targets: Int[Array, '*b'],
  mask: Bool[Array, '*b'] | None = None,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Negative log-likelihood of the targets.

  Args:
    logits: unnormalised log-probabilities.
    targets: token ids, in [0, v).
    mask: True for targets that count; all by default.

  Returns:
    The sum over the targets that count, in nats, and their number.
  """
  nats = token_cross_entropy(logits, targets)
  if mask is None:
    return nats.sum(), jnp.float32(nats.size)
  return jnp.where(mask, nats, 0).sum(), mask.sum(dtype=jnp.float32)
