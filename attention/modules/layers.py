"""Small layers that the others are made of."""

import math
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from attention.ops.dropout import Dropout, check_rate


class Linear(hk.Linear):
  """`hk.Linear` that flattens the leading axes before the matrix product.

  Its weights' gradient is then one 2-D product too, where on CPU XLA would
  transpose and copy the operands of a product with more axes. The bias's
  gradient adds up in float32: see `add`.
  """

  def __call__(self, inputs, *, precision=None):
    flat = inputs.reshape(math.prod(inputs.shape[:-1]), inputs.shape[-1])
    init = self.w_init or hk.initializers.TruncatedNormal(
      1 / math.sqrt(inputs.shape[-1])
    )
    shape = (inputs.shape[-1], self.output_size)
    weights = hk.get_parameter('w', shape, inputs.dtype, init)
    outputs = jnp.dot(flat, weights, precision=precision)
    if self.with_bias:
      bias = hk.get_parameter('b', shape[1:], inputs.dtype, self.b_init)
      outputs = add(outputs, bias)
    return outputs.reshape(*inputs.shape[:-1], self.output_size)


class Embed(hk.Embed):
  """`hk.Embed` whose gradient, a sum over tokens, adds up in float32."""

  def __call__(self, ids):
    table = self.embeddings
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    return table.astype(dtype)[ids].astype(table.dtype)


def add(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x + bias, which broadcasts to x; added in float32, in the dtype of x.

  The bias's gradient is a sum over many positions: in bfloat16 it would stop
  growing where a term is 1/256 of it.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(dtype) + bias.astype(dtype)).astype(x.dtype)


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
  """Drops entries with probability `rate` and scales up the rest.

  By a hash of their positions: drawing `jax.random`'s bits takes a CPU longer
  than what is done with them.

  Raises:
    ValueError: a rate outside [0, 1).
  """
  check_rate(rate)
  if not is_training or not rate:
    return x
  rows = math.prod(x.shape[:-1])
  drawn = Dropout.create(hk.next_rng_key(), rate)
  kept = drawn.kept(0, 0, rows, 0, x.shape[-1]).reshape(x.shape)
  return jnp.where(kept, x / (1 - rate), 0)


class Affine(NamedTuple):
  """x weights + bias, as a pytree of its parameters.

  A layer that asks for its parameters first and is called later: inside JAX's
  loops, where Haiku's modules may not be.
  """

  weights: object  # [a, o]
  bias: object  # [o]

  def __call__(self, x):
    flat = add(x.reshape(-1, x.shape[-1]) @ self.weights, self.bias)
    return flat.reshape(*x.shape[:-1], -1)


class Norm(NamedTuple):
  """`LayerNorm`, as a pytree of its parameters."""

  scale: object  # [m]
  offset: object  # [m]

  def __call__(self, x):
    y = normalise(x.astype(jnp.float32)) * self.scale + self.offset
    return y.astype(x.dtype)


def affine(name, size, x, *, scale=1.0, bias=0.0) -> Affine:
  """The parameters `weights` and `bias` of a module `name` for inputs like x.

  Weights are normal, truncated, of variance `scale` / width of x.
  """
  init = hk.initializers.Constant(0.0)
  if scale:
    init = hk.initializers.VarianceScaling(scale, 'fan_in', 'truncated_normal')
  specs = {
    'weights': ((x.shape[-1], size), init),
    'bias': ((size,), hk.initializers.Constant(bias)),
  }
  return Affine(**_Parameters(name)(x.dtype, specs))


def norm(name, x) -> Norm:
  """Parameters `scale` and `offset` of a module `name` for inputs like x."""
  shape = x.shape[-1:]
  specs = {'scale': (shape, jnp.ones), 'offset': (shape, jnp.zeros)}
  return Norm(**_Parameters(name)(x.dtype, specs))


class _Parameters(hk.Module):
  """A module that is nothing but its parameters."""

  def __call__(self, dtype, specs):
    return {
      name: hk.get_parameter(name, shape, dtype, init).astype(dtype)
      for name, (shape, init) in specs.items()
    }
