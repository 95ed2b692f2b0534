"""Codes that tell attention where a token stands."""

import jax
import jax.numpy as jnp


def sinusoidal(length: int, size: int, base: float = 10_000.0) -> jax.Array:
  """Sines and cosines of the position (Vaswani et al. 2017, section 3.5).

  Channel 2i holds sin(position / base^(2i / size)), channel 2i + 1 its cosine,
  so the code of position p + k is a rotation of that of p.

  Args:
    length: positions, from 0.
    size: channels.
    base: the longest wavelength is 2π · base positions.

  Returns:
    [length, size] float32.

  Raises:
    ValueError: length or size is not positive.
  """
  for name, count in (('length', length), ('size', size)):
    if count <= 0:
      raise ValueError(f'{name}: expected a positive int, got {count}')
  channels = jnp.arange(size)
  frequencies = base ** (-(channels // 2 * 2) / size)
  angles = jnp.arange(length)[:, None] * frequencies
  return jnp.where(channels % 2 == 0, jnp.sin(angles), jnp.cos(angles))
