"""Products of activations with weights, optionally with bfloat16 operands.

Inside `operands_in(jnp.bfloat16)`, both operands of a product are rounded to
bfloat16 and its sums are accumulated in float32. The gradients are products of
the same kind. Everything between the products stays in float32.

Some processors compute these products at a multiple of the speed of float32
ones. XLA's CPU backend ignores
`jax.default_matmul_precision`, so the operands are converted here.
"""

import contextlib
import dataclasses
import functools
import math
import threading

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops import few_rows, meshes

_local = threading.local()


@contextlib.contextmanager
def operands_in(dtype):
  """Traces products with operands of this dtype, in this thread only.

  JAX reuses a program that it traced before, in whichever context that was.

  Args:
    dtype: of the operands, below float32; None: unchanged.
  """
  before = _dtype()
  _local.dtype = None if dtype is None else jnp.dtype(dtype)
  try:
    yield
  finally:
    _local.dtype = before


def _dtype():
  return getattr(_local, 'dtype', None)


def dot(
  x, weights, axes: int = 1, *, is_transposed: bool = False, precision=None
):
  """The product of x with weights, in their dtype.

  In a context `operands_in`, float32 operands are rounded to the context's
  dtype, unless `precision` is given. The product then has no forward-mode
  derivative. Few rows take the kernel of `few_rows` on CPUs.

  Args:
    x: [*b, *c], activations.
    weights: [*c, *o].
    axes: the number of axes c, over which the product sums.
    is_transposed: whether the weights are [o, c], one axis each.
    precision: as in `jnp.dot`.

  Returns:
    [*b, *o].
  """
  dtype = _dtype()
  if not x.dtype == weights.dtype == jnp.float32 or precision is not None:
    dtype = None
  first, last = x.shape[: x.ndim - axes], weights.shape[axes:]
  count = math.prod(x.shape[x.ndim - axes :])
  if is_transposed:
    last = weights.shape[:1]
  if dtype is None and precision is None:
    flat = jax.ShapeDtypeStruct((math.prod(first), count), x.dtype)
    if few_rows.is_supported(flat, weights):
      flat = x.reshape(flat.shape)
      if not is_transposed:
        weights = weights.reshape(count, -1)
      products = few_rows.product(is_transposed, flat, weights)
      return products.reshape(*first, *last)
  if is_transposed:
    weights = weights.T
  if dtype is None:
    # In the order of `jnp.einsum`, which sums the last of them first.
    summed = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    summed = tuple(i[::-1] for i in summed)
    return jnp.tensordot(x, weights, summed, precision=precision)
  # XLA cannot cut a flattened axis by positions.
  is_cut = meshes.size(meshes.CONTEXT) > 1
  rows = first if is_cut else (math.prod(first),)
  products = _rounded(
    _Rounded(dtype), x.reshape(*rows, count), weights.reshape(count, -1)
  )
  return products.reshape(*first, *last)


@dataclasses.dataclass(frozen=True)
class _Rounded:
  """The three products of a layer, of rounded operands with float32 sums."""

  dtype: jnp.dtype

  def round(self, x):
    return x.astype(self.dtype)

  def forward(self, x, weights):
    """[*b, a], [a, o] → [*b, o]."""
    return self._multiply(x, weights, (x.ndim - 1,), (0,))

  def of_x(self, d_products, weights):
    """[*b, o], [a, o] → [*b, a]."""
    return self._multiply(d_products, weights, (d_products.ndim - 1,), (1,))

  def of_weights(self, x, d_products):
    """[*b, a], [*b, o] → [a, o]."""
    rows = tuple(range(x.ndim - 1))

    def transposed(x, d_products):
      # XLA for CPUs knows fast products only of operands in this order.
      x = jnp.moveaxis(x, -1, 0)
      after = tuple(i + 1 for i in rows)
      return _fenced(x, d_products, (after, rows))

    return lax.platform_dependent(
      x,
      d_products,
      cpu=transposed,
      default=functools.partial(_plain, axes=(rows, rows)),
    )

  def _multiply(self, x, y, of_x, of_y):
    return lax.platform_dependent(
      x,
      y,
      cpu=functools.partial(_fenced, axes=(of_x, of_y)),
      default=functools.partial(_plain, axes=(of_x, of_y)),
    )


def _plain(x, y, axes):
  return lax.dot_general(
    x, y, (axes, ((), ())), preferred_element_type=jnp.float32
  )


def _fenced(x, y, axes):
  """The product alone, of operands in row-major order.

  XLA for CPUs decides early whether a product is one of those that it can
  compute in bfloat16. Transpositions that it later moves into the product make
  it one that it cannot, and the program fails when it runs (JAX 0.10.2).
  """
  return _fence(_plain(_fence(x), _fence(y), axes))


def _fence(x):
  # A reshaped array has the row-major order.
  return lax.optimization_barrier(x[None])[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(kind, x, weights):
  return kind.forward(kind.round(x), kind.round(weights))


def _forward(kind, x, weights):
  saved = kind.round(x), kind.round(weights)
  return kind.forward(*saved), saved


def _backward(kind, saved, d_products):
  x, weights = saved
  d_products = kind.round(d_products)
  return kind.of_x(d_products, weights), kind.of_weights(x, d_products)


_rounded.defvjp(_forward, _backward)
