"""Which dtypes a run stores, computes and gives out."""

import contextlib

import haiku as hk
import jax.numpy as jnp
import jmp

from attention import models

# Where the scale of a float16 loss starts, and below what it never falls.
_SCALE, _LEAST = 2.0**15, 1.0


def parse(text: str) -> jmp.Policy | None:
  """The policy that a text such as 'params=float32,compute=bfloat16' names.

  Args:
    text: as `jmp.get_policy` reads it; '': none, all is float32.

  Raises:
    ValueError: it names none, or one whose parameters aren't float32.
  """
  if not text:
    return None
  try:
    policy = jmp.get_policy(text)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      'training.precision: expected such as '
      "'params=float32,compute=bfloat16,output=float32', "
      f'got {text!r} ({error})'
    ) from None
  if policy.param_dtype != jnp.float32:
    raise ValueError(
      'training.precision: expected params=float32, where small updates count, '
      f'got {text!r}; for example '
      f'params=float32,compute={jnp.dtype(policy.compute_dtype)},output=float32'
    )
  return policy


@contextlib.contextmanager
def applied(text: str):
  """Meanwhile, models are traced with that policy, in this thread."""
  policy = parse(text)
  with contextlib.ExitStack() as stack:
    for model in models.classes() if policy else ():
      stack.enter_context(hk.mixed_precision.push_policy(model, policy))
    yield


def initial_scale(text: str) -> dict:
  """What a state holds of its loss scale: nothing, if not float16."""
  policy = parse(text)
  if policy is None or policy.compute_dtype != jnp.float16:
    return {}
  return {'scale': jnp.float32(_SCALE), 'unchanged': jnp.int32(0)}


def adjust(scale: dict, is_finite) -> dict:
  """The scale after a step: halved, or doubled after many finite ones."""
  if not scale:
    return {}
  adjusted = jmp.DynamicLossScale(
    scale['scale'], scale['unchanged'], min_loss_scale=jnp.float32(_LEAST)
  ).adjust(is_finite)
  return {'scale': adjusted.loss_scale, 'unchanged': adjusted.counter}


def may_fall(scale: dict):
  """Whether a gradient that isn't finite may be the scale's fault."""
  return scale['scale'] > _LEAST if scale else jnp.bool(False)
