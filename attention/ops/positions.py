"""Position encodings: sinusoidal and rotary."""

import jax
import jax.numpy as jnp


def sinusoidal(length: int, size: int, base: float = 10_000.0) -> jax.Array:
  """Compute sinusoidal encodings (Vaswani et al. 2017, section 3.5).

  Channel 2i holds sin(position / base^(2i / size)) and channel 2i + 1 the
  cosine of the same angle, so the encoding of position p + k is a rotation of
  that of p.

  Args:
    length: number of positions, from 0.
    size: number of channels.
    base: the longest wavelength is 2π · base positions.

  Returns:
    [length, size] float32.

  Raises:
    ValueError: length or size is not positive.
  """
  for name, count in (('length', length), ('size', size)):
    if count <= 0:
      raise ValueError(f'{name}: expected a positive int, got {count}')
  channels = jnp.arange(size, dtype=jnp.float32)
  frequencies = base ** (-(channels // 2 * 2) / size)
  angles = jnp.arange(length)[:, None] * frequencies
  return jnp.where(channels % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def rotary(x, positions, base: float = 10_000.0):
  """Rotate pairs of channels by the position (Su et al. 2021, equation 34).

  Channels 2i and 2i + 1 are a point in the plane, which is rotated by the angle
  position / base^(2i / d). The dot product of a rotated query and a rotated key
  depends only on the difference of their positions.

  Args:
    x: [*b, t, h, d] queries or keys, d even.
    positions: [t] or [*b, t] numbers.
    base: the slowest pair completes a turn in about 2π · base positions.

  Returns:
    [*b, t, h, d] in the dtype of `x`; the angles are in float32.

  Raises:
    ValueError: d is odd, or the shape of `positions` doesn't fit.
  """
  x, positions = jnp.asarray(x), jnp.asarray(positions)
  size = x.shape[-1]
  if size % 2:
    raise ValueError(f'x: expected an even number of channels, got {size}')
  expected = x.shape[:-2]  # [*b, t]
  fits = 0 < positions.ndim <= len(expected) and all(
    p in (1, n)
    for p, n in zip(positions.shape, expected[-positions.ndim :], strict=True)
  )
  if not fits:
    raise ValueError(
      f'positions: expected a shape broadcastable to [*b, t] = {expected}, '
      f'got {positions.shape}'
    )
  channels = jnp.arange(0, size, 2, dtype=jnp.float32)
  frequencies = base ** (-channels / size)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  even, odd = (x[..., i::2].astype(jnp.float32) for i in (0, 1))
  pairs = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return pairs.reshape(x.shape).astype(x.dtype)
