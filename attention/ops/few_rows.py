"""Products of few rows with large weights, as in decoding.

They take as long as reading the weights. XLA's CPU backend reads them on one
thread; the kernel of `cpu_kernels` reads them on all, once for all rows, and
also reads bfloat16 weights, in half the time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from attention.ops import cpu_kernels
from attention.ops.platforms import PLATFORMS, by_platform

_MOST_ROWS = 32
_LEAST_WEIGHTS = 2**14  # numbers; with fewer, starting a kernel takes longer
_DTYPES = jnp.float32, jnp.bfloat16


def is_supported(x, weights) -> bool:
  """Whether `product` is of use for x [r, a] and weights; shapes suffice."""
  return (
    0 < len(x) <= _MOST_ROWS
    and weights.size >= _LEAST_WEIGHTS
    and x.dtype in _DTYPES
    and weights.dtype in _DTYPES
    and jnp.promote_types(x.dtype, weights.dtype) == x.dtype
    and cpu_kernels.reason() is None
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(is_transposed: bool, x, weights):
  """The product of x with weights, summed in float32.

  Args:
    is_transposed: whether the weights are [o, a].
    x: [r, a] float32 or bfloat16.
    weights: [a, o] float32 or bfloat16.

  Returns:
    [r, o] in the dtype of x.
  """
  shape = len(x), weights.shape[0 if is_transposed else 1]
  choices = (
    ('cpu', Kernel(is_transposed)),
    *((p, _Plain(is_transposed)) for p in PLATFORMS if p != 'cpu'),
  )
  expected = jax.ShapeDtypeStruct(shape, x.dtype)
  return by_platform(choices, 'multiply', expected, x, weights)


def _product_jvp(is_transposed, primals, tangents):
  (x, weights), (dx, d_weights) = primals, tangents
  multiply = _Plain(is_transposed).multiply
  y = product(is_transposed, x, weights)
  terms = [
    multiply(*factors)
    for factors in ((dx, weights), (x, d_weights))
    if not any(isinstance(f, SymbolicZero) for f in factors)
  ]
  return y, sum(terms)


# XLA returns NaN for some fused products with zeros (JAX 0.10.2).
product.defjvp(_product_jvp, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class _Plain:
  """XLA's own product."""

  is_transposed: bool

  def multiply(self, x, weights):
    weights = weights.T if self.is_transposed else weights
    return jnp.dot(x, weights).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Kernel(_Plain):
  """The kernel, or XLA's product where XLA divides the program over devices."""

  @property
  def whole(self):
    return _Whole(self.is_transposed)


@dataclasses.dataclass(frozen=True)
class _Whole(_Plain):
  """The kernel; under `vmap`, there are many rows, and XLA's product."""

  def multiply(self, x, weights):
    plain = super().multiply

    @jax.custom_batching.custom_vmap
    def multiply(x, weights):
      columns = weights.shape[0 if self.is_transposed else 1]
      shape = jax.ShapeDtypeStruct((len(x), columns), x.dtype)
      call = jax.ffi.ffi_call('attention_product', shape)
      return call(x, weights, is_transposed=self.is_transposed)

    @multiply.def_vmap
    def _(size, is_mapped, x, weights):
      axes = [0 if m else None for m in is_mapped]
      return jax.vmap(plain, axes, axis_size=size)(x, weights), True

    return multiply(x, weights)
