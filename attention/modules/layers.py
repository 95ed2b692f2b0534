"""The layers that all modules share: linear, norms, embedding, dropout."""

import dataclasses
import functools
import math

import haiku as hk
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention.ops import meshes, products
from attention.ops.dropout import Dropout, check_rate


class Stream(hk.Module):
  """Marks where activations enter and leave a block; computes nothing.

  `attention.capture` and `attention.edit` read and change them there.
  """

  def before(self, x):
    """Returns the activations that enter."""
    return x

  def after(self, x):
    """Returns the activations that leave."""
    return x


class Linear(hk.Linear):
  """`hk.Linear`, computed by `linear`."""

  def __call__(self, inputs, *, precision=None):
    init = self.w_init or hk.initializers.TruncatedNormal(
      1 / math.sqrt(inputs.shape[-1])
    )
    shape = (inputs.shape[-1], self.output_size)
    weights = hk.get_parameter('w', shape, inputs.dtype, init)
    bias = None
    if self.with_bias:
      bias = hk.get_parameter('b', shape[1:], inputs.dtype, self.b_init)
    return linear(inputs, weights, bias, precision=precision)


class Embed(hk.Embed):
  """`hk.Embed` with a gradient that is accumulated over tokens in float32."""

  def __call__(self, ids):
    # XLA would rather gather the activations than a table cut over devices.
    table = meshes.whole(self.embeddings)
    dtype = jnp.promote_types(table.dtype, jnp.float32)
    return table.astype(dtype)[ids].astype(table.dtype)


def linear(x, weights, bias=None, *, precision=None):
  """x weights + bias, with the leading axes flattened to one.

  The gradient of the weights is then a 2-D product as well; with more axes XLA
  on CPU transposes and copies the operands. Under a mesh that cuts positions
  they are kept: XLA cannot cut a flattened axis by positions.

  Args:
    x: [*b, a].
    weights: [a, o].
    bias: [o] or None; its gradient is accumulated in float32, see `add`.
    precision: as in `jnp.dot`.

  Returns:
    [*b, o].
  """
  is_cut = meshes.size(meshes.CONTEXT) > 1
  flat = x if is_cut else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  outputs = products.dot(meshes.cut_batch(flat), weights, precision=precision)
  outputs = meshes.cut_batch(outputs)
  if bias is not None:
    outputs = add(outputs, bias)
  return outputs.reshape(*x.shape[:-1], weights.shape[-1])


def cast_weights(params: dict, dtype) -> dict:
  """Keep the weights of linear layers in another dtype.

  Activations, norms and embeddings keep theirs: a product takes the dtype of
  its activations. Decoding reads all weights for each token; see
  `attention.ops.few_rows`.

  Args:
    params: the parameters of a model, by module and name.
    dtype: of the weights `w` [a, o].
  """
  return {
    module: {
      name: x.astype(dtype) if name == 'w' and x.ndim == 2 else x
      for name, x in own.items()
    }
    for module, own in params.items()
  }


def add(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x + bias in the dtype of x, added in float32; bias broadcasts to x.

  The gradient of the bias is a sum over many positions. In bfloat16 such a sum
  stops growing once a term is smaller than 1/256 of it.
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(dtype) + bias.astype(dtype)).astype(x.dtype)


@dataclasses.dataclass(kw_only=True, eq=False)
class LayerNorm(hk.Module):
  """Layer normalisation over the last axis (Ba et al. 2016), in float32.

  Parameters are those of `hk.LayerNorm`: `scale` and `offset`, learned. The
  output has the dtype of the input.
  """

  epsilon: float = 1e-5  # added to the variance
  name: str | None = None

  def __call__(self, x):
    shape = x.shape[-1:]
    scale = hk.get_parameter('scale', shape, x.dtype, jnp.ones)
    offset = hk.get_parameter('offset', shape, x.dtype, jnp.zeros)
    return layer_norm(x, scale, offset, self.epsilon)


def layer_norm(x, scale, offset, epsilon: float = 1e-5):
  """Layer normalisation of x [*b, m] with scale and offset [m]."""
  exact = normalise(x.astype(jnp.float32), epsilon)
  return (exact * scale + offset).astype(x.dtype)


@dataclasses.dataclass(kw_only=True, eq=False)
class RMSNorm(hk.Module):
  """x / √(mean of x²) · scale over the last axis (Zhang & Sennrich 2019).

  In float32; the output has the dtype of the input. A zero-centred scale is
  stored as its difference from 1, so that weight decay draws it to 1 (Gemma).
  """

  epsilon: float = 1e-5  # added to the mean of x²
  is_zero_centred: bool = False
  name: str | None = None

  def __call__(self, x):
    init = jnp.zeros if self.is_zero_centred else jnp.ones
    scale = hk.get_parameter('scale', x.shape[-1:], x.dtype, init)
    exact = x.astype(jnp.float32)
    if self.is_zero_centred:
      scale = 1 + scale.astype(jnp.float32)
    squares = jnp.square(exact).mean(-1, keepdims=True)
    return (exact * jax.lax.rsqrt(squares + self.epsilon) * scale).astype(
      x.dtype
    )


NORMS = {
  'layer': LayerNorm,
  'rms': RMSNorm,
  'zero_centred_rms': functools.partial(RMSNorm, is_zero_centred=True),
}


def _normalise(x, epsilon):
  centred = x - x.mean(-1, keepdims=True)
  variance = jnp.square(centred).mean(-1, keepdims=True)
  inverse = jax.lax.rsqrt(variance + epsilon)
  return centred * inverse, inverse


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalise(x: jax.Array, epsilon: float = 1e-5) -> jax.Array:
  """(x - mean) / √(variance + epsilon) over the last axis."""
  return _normalise(x, epsilon)[0]


@normalise.defjvp
def _normalise_jvp(epsilon, primals, tangents):
  # Saves the output and one number a row; differentiating the formula would
  # save every intermediate result.
  (x,), (dx,) = primals, tangents
  y, inverse = _normalise(x, epsilon)
  along = (dx * y).mean(-1, keepdims=True)
  return y, (dx - dx.mean(-1, keepdims=True) - y * along) * inverse


def dropout(x: jax.Array, rate: float, is_training: bool) -> jax.Array:
  """Drops entries with probability `rate` and scales up the rest.

  The choice is a hash of positions: on CPU, drawing bits with `jax.random`
  takes longer than using them.

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


def bind_linear(name, size, x, *, scale=1.0, bias=0.0) -> Partial:
  """`linear` bound to the parameters `weights` and `bias` of a module `name`.

  A bound layer is a pytree of its parameters. JAX's loops can call it, where
  Haiku does not allow its modules.

  Args:
    name: the module's name.
    size: width of the output.
    x: [*b, a], an input.
    scale: the weights are drawn from a truncated normal distribution of
      variance scale / a; 0 initialises them to zeros.
    bias: initial value of the bias.
  """
  init = hk.initializers.Constant(0.0)
  if scale:
    init = hk.initializers.VarianceScaling(scale, 'fan_in', 'truncated_normal')
  specs = {
    'weights': ((x.shape[-1], size), init),
    'bias': ((size,), hk.initializers.Constant(bias)),
  }
  return Partial(linear, **_Parameters(name)(x.dtype, specs))


def bind_layer_norm(name, x) -> Partial:
  """`layer_norm` bound to the parameters of a module `name`; a pytree."""
  shape = x.shape[-1:]
  specs = {'scale': (shape, jnp.ones), 'offset': (shape, jnp.zeros)}
  return Partial(layer_norm, **_Parameters(name)(x.dtype, specs))


class _Parameters(hk.Module):
  """A module that holds parameters and computes nothing."""

  def __call__(self, dtype, specs):
    return {
      name: hk.get_parameter(name, shape, dtype, init).astype(dtype)
      for name, (shape, init) in specs.items()
    }
