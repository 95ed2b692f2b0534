"""Softmax that stays finite in every dtype."""

import jax
import jax.numpy as jnp

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def stable_softmax(logits, axis: int = -1):
  """Compute exp(logits) / sum exp(logits) in float32.

  Jumper et al. (2021) compute attention's softmax this way in bfloat16, whose
  eight bits of precision lose small terms of the sum.

  Args:
    logits: array of any shape; float32, bfloat16 or float16.
    axis: the axis that sums to one.

  Returns:
    Weights in the dtype of `logits`.

  Raises:
    ValueError: the dtype is unsupported.
  """
  logits = jnp.asarray(logits)
  if logits.dtype not in FLOATS:
    raise ValueError(
      'logits: expected float32, bfloat16 or float16, got '
      f'{logits.dtype}; convert with logits.astype(jnp.float32)'
    )
  weights = jax.nn.softmax(logits.astype(jnp.float32), axis=axis)
  return weights.astype(logits.dtype)
