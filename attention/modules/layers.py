"""Small layers that the others are made of."""

import math

import haiku as hk
import jax
import jax.numpy as jnp


class Linear(hk.Linear):
  """`hk.Linear` that flattens the leading axes before the matrix product.

  Its weights' gradient is then one 2-D product too, where on CPU XLA would
  transpose and copy the operands of a product with more axes.
  """

  def __call__(self, inputs, *, precision=None):
    flat = inputs.reshape(math.prod(inputs.shape[:-1]), inputs.shape[-1])
    outputs = super().__call__(flat, precision=precision)
    return outputs.reshape(*inputs.shape[:-1], outputs.shape[-1])


class LayerNorm(hk.Module):
  """Layer normalisation over the last axis (Ba et al. 2016), in float32.

  Parameters are those of `hk.LayerNorm`: `scale` and `offset`, learned. The
  output has the dtype of the input.
  """

  def __call__(self, x):
    shape = x.shape[-1:]
    scale = hk.get_parameter('scale', shape, x.dtype, jnp.ones)
    offset = hk.get_parameter('offset', shape, x.dtype, jnp.zeros)
    return (normalise(x.astype(jnp.float32)) * scale + offset).astype(x.dtype)


class RMSNorm(hk.Module):
  """x / √(mean of x²) · scale over the last axis (Zhang & Sennrich 2019).

  In float32; the output has the dtype of the input.
  """

  def __call__(self, x):
    scale = hk.get_parameter('scale', x.shape[-1:], x.dtype, jnp.ones)
    exact = x.astype(jnp.float32)
    squares = jnp.square(exact).mean(-1, keepdims=True)
    return (exact * jax.lax.rsqrt(squares + _EPSILON) * scale).astype(x.dtype)


_EPSILON = 1e-5


def _normalise(x):
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + _EPSILON)
  return centred * inverse, inverse


@jax.custom_jvp
def normalise(x: jax.Array) -> jax.Array:
  """(x - mean) / √(variance + 1e-5) over the last axis."""
  return _normalise(x)[0]


@normalise.defjvp
def _normalise_jvp(primals, tangents):
  # Written out: it needs the output and one number a row, where the derivative
  # of the formula keeps every intermediate result.
  (x,), (dx,) = primals, tangents
  y, inverse = _normalise(x)
  along = (dx * y).mean(-1, keepdims=True)
  return y, (dx - dx.mean(-1, keepdims=True) - y * along) * inverse


def dropout(x: jax.Array, rate: float, is_training: bool) -> jax.Array:
  """Drops entries with probability `rate` and scales up the rest."""
  if not is_training or not rate:
    return x
  return hk.dropout(hk.next_rng_key(), rate, x)
