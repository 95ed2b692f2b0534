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


class LayerNorm(hk.LayerNorm):
  """`hk.LayerNorm` over the last axis, computed in float32.

  Scale and offset are learned; the output has the dtype of the input.
  """

  def __init__(self, name: str | None = None):
    super().__init__(axis=-1, create_scale=True, create_offset=True, name=name)

  def __call__(self, inputs):
    return super().__call__(inputs.astype(jnp.float32)).astype(inputs.dtype)


def dropout(x: jax.Array, rate: float, is_training: bool) -> jax.Array:
  """Drops entries with probability `rate` and scales up the rest."""
  if not is_training or not rate:
    return x
  return hk.dropout(hk.next_rng_key(), rate, x)
