"""Mixed precision: dtype policies, products and the float16 loss scale."""

import contextlib
import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from attention import models
from attention.ops import products

# Initial and minimum loss scale for float16.
_INITIAL_SCALE, _MIN_SCALE = 2.0**15, 1.0


@dataclasses.dataclass(frozen=True)
class Precision:
  """A parsed `config.training.precision`."""

  policy: jmp.Policy | None = None  # of whole models; None: float32
  products: jnp.dtype | None = None  # of the operands of layers' products


def parse(text: str) -> Precision:
  """Parse a policy such as 'params=float32,compute=bfloat16'.

  Args:
    text: in the syntax of `jmp.get_policy`, with one more key:
      products=bfloat16 rounds only the operands of the products of layers, see
      `attention.ops.products`. '' means float32 throughout.

  Raises:
    ValueError: `text` is not a policy, its parameters are not float32, or it
      gives both `products` and a `compute` other than float32.
  """
  if not text:
    return Precision()
  try:
    others, dtype = _split(text)
    policy = jmp.get_policy(others) if others else None
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      'training.precision: expected a policy such as '
      "'params=float32,compute=bfloat16,output=float32' or "
      f"'products=bfloat16', got {text!r} ({error})"
    ) from None
  if policy is not None and policy.param_dtype != jnp.float32:
    raise ValueError(
      'training.precision: expected params=float32, because small updates are '
      f'lost in lower precision, got {text!r}; for example '
      f'params=float32,compute={jnp.dtype(policy.compute_dtype)},output=float32'
    )
  if dtype and policy is not None and policy.compute_dtype != jnp.float32:
    raise ValueError(
      'training.precision: expected either compute or products, because '
      f'compute is the dtype of the products as well, got {text!r}'
    )
  return Precision(policy, dtype)


def _split(text):
  """Separate the key `products`: ('params=float32', its dtype or None)."""
  others, dtype = [], None
  for part in text.split(','):
    key, _, value = part.partition('=')
    if key != 'products':
      others.append(part)
    elif value not in ('bfloat16', 'bf16'):
      raise ValueError(f'products: expected bfloat16, got {value!r}')
    else:
      dtype = jnp.dtype(jnp.bfloat16)
  return ','.join(others), dtype


@contextlib.contextmanager
def applied(text: str):
  """Trace models with this policy inside the context, in this thread only."""
  parsed = parse(text)
  with contextlib.ExitStack() as stack:
    for model in models.classes() if parsed.policy else ():
      stack.enter_context(hk.mixed_precision.push_policy(model, parsed.policy))
    stack.enter_context(products.operands_in(parsed.products))
    yield


def compile(lowered, text: str, platform: str):
  """Compile a lowered program with the options for this policy."""
  try:
    return lowered.compile(compiler_options=compiler_options(text, platform))
  except jax.errors.JaxRuntimeError:  # a version of XLA without the options
    return lowered.compile()


def compiler_options(text: str, platform: str) -> dict:
  """Return XLA's options for programs with this policy on this platform.

  On CPUs, XLA gives products and sums to YNN by default. In float32, its
  products are slower than Eigen's, which take their place when YNN is left the
  sums.
  """
  if text or platform != 'cpu':
    return {}
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE'}


def initial_scale(text: str) -> dict:
  """Return the initial loss-scale state; empty unless float16 is used."""
  policy = parse(text).policy
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
