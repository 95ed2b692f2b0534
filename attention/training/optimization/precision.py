"""Mixed precision: dtype policies and the float16 loss scale."""

import contextlib

import haiku as hk
import jax.numpy as jnp
import jmp

from attention import models

# Initial and minimum loss scale for float16.
_INITIAL_SCALE, _MIN_SCALE = 2.0**15, 1.0


def parse(text: str) -> jmp.Policy | None:
  """Parse a policy such as 'params=float32,compute=bfloat16'.

  Args:
    text: in the syntax of `jmp.get_policy`; '' means float32 throughout.

  Returns:
    The policy, or None if `text` is empty.

  Raises:
    ValueError: `text` is not a policy, or its parameters are not float32.
  """
  if not text:
    return None
  try:
    policy = jmp.get_policy(text)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      'training.precision: expected a policy such as '
      "'params=float32,compute=bfloat16,output=float32', "
      f'got {text!r} ({error})'
    ) from None
  if policy.param_dtype != jnp.float32:
    raise ValueError(
      'training.precision: expected params=float32, because small updates are '
      f'lost in lower precision, got {text!r}; for example '
      f'params=float32,compute={jnp.dtype(policy.compute_dtype)},output=float32'
    )
  return policy


@contextlib.contextmanager
def applied(text: str):
  """Trace models with this policy inside the context, in this thread only."""
  policy = parse(text)
  with contextlib.ExitStack() as stack:
    for model in models.classes() if policy else ():
      stack.enter_context(hk.mixed_precision.push_policy(model, policy))
    yield


def initial_scale(text: str) -> dict:
  """Return the initial loss-scale state; empty unless float16 is used."""
  policy = parse(text)
  if policy is None or policy.compute_dtype != jnp.float16:
    return {}
  return {'scale': jnp.float32(_INITIAL_SCALE), 'unchanged': jnp.int32(0)}


def adjust(scale: dict, is_finite) -> dict:
  """Halve the scale after an overflow; double it after many finite steps."""
  if not scale:
    return {}
  adjusted = jmp.DynamicLossScale(
    scale['scale'], scale['unchanged'], min_loss_scale=jnp.float32(_MIN_SCALE)
  ).adjust(is_finite)
  return {'scale': adjusted.loss_scale, 'unchanged': adjusted.counter}


def can_decrease(scale: dict):
  """Whether a non-finite gradient may be caused by too large a loss scale."""
  return scale['scale'] > _MIN_SCALE if scale else jnp.bool(False)
