"""Position encodings: sinusoidal and rotary."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
  """How fast `rotary` rotates which channels.

  Pair i of n rotated channels turns by base^(-2i / n) per position. Models
  whose context was extended after training slow some pairs down:

  - 'linear': all pairs by `factor` (Chen et al. 2023, arXiv:2306.15595).
  - 'llama3': pairs with wavelengths above original_length / low_frequency by
    `factor`, those below original_length / high_frequency not at all, and those
    between them in part (Llama 3.1's parameters).
  - 'yarn': pairs that turn fewer than beta_slow times in original_length by
    `factor`, those that turn more than beta_fast times not at all, and those
    between them in part; and logits grow (Peng et al. 2023, arXiv:2309.00071).
  """

  base: int | float = 10_000.0
  num_channels: int | None = None  # rotated ones, the first; None: all
  pairs: str = 'adjacent'  # 2i and 2i + 1; or 'halves': i and i + n/2
  scaling: str = 'none'  # linear, llama3 or yarn
  factor: int | float = 1.0  # new length / original_length
  original_length: int = 8192  # of the contexts in training
  low_frequency: int | float = 1.0  # turns in original_length, of 'llama3'
  high_frequency: int | float = 4.0
  beta_slow: int | float = 1.0  # turns in original_length, of 'yarn'
  beta_fast: int | float = 32.0
  with_whole_pairs: bool = True  # 'yarn' rounds its bounds to whole pairs
  amplitude: int | float | None = (
    None  # of queries and keys; None: the scaling's
  )

  def __post_init__(self):
    for field, known in (
      ('scaling', ['none', 'linear', 'llama3', 'yarn']),
      ('pairs', ['adjacent', 'halves']),
    ):
      if (value := getattr(self, field)) not in known:
        raise ValueError(f'{field}: expected one of {known}, got {value!r}')
    for field in ('base', 'factor', 'original_length'):
      if (value := getattr(self, field)) <= 0:
        raise ValueError(f'{field}: expected a number above 0, got {value}')
    if self.low_frequency >= self.high_frequency:
      raise ValueError(
        f'low_frequency: expected less than high_frequency='
        f'{self.high_frequency}, got {self.low_frequency}'
      )

  def frequencies(self, size: int) -> np.ndarray:
    """Compute the angles per position of `size` rotated channels, [size / 2].

    In radians, float64.
    """
    plain = self.base ** (-np.arange(0, size, 2) / size)
    slow = plain / self.factor
    if self.scaling == 'none':
      return plain
    if self.scaling == 'linear':
      return slow
    if self.scaling == 'llama3':
      turns = self.original_length * plain / (2 * math.pi)
      span = self.high_frequency - self.low_frequency
      kept = ((turns - self.low_frequency) / span).clip(0, 1)
    else:
      low, high = (
        self._pair(size, self.beta_fast),
        self._pair(size, self.beta_slow),
      )
      if self.with_whole_pairs:
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, size - 1)
      span = max(high - low, 0.001)
      kept = 1 - ((np.arange(size // 2) - low) / span).clip(0, 1)
    return slow + (plain - slow) * kept

  def _pair(self, size, turns):
    """The (fractional) pair that turns so often in `original_length`."""
    wavelength = self.original_length / turns / (2 * math.pi)
    return size * math.log(wavelength) / (2 * math.log(self.base))

  @property
  def scale(self) -> float:
    """What rotated queries and keys are multiplied by."""
    if self.amplitude is not None:
      return self.amplitude
    is_longer = self.scaling == 'yarn' and self.factor > 1
    return 0.1 * math.log(self.factor) + 1 if is_longer else 1.0


def rotary(x, positions, base: float = 10_000.0, *, kind: Rotary | None = None):
  """Rotate pairs of channels by the position (Su et al. 2021, equation 34).

  Channels 2i and 2i + 1 are a point in the plane, which is rotated by the angle
  position / base^(2i / d). The dot product of a rotated query and a rotated key
  depends only on the difference of their positions. Published models often pair
  channels i and i + d/2 instead (`Rotary.pairs`).

  Args:
    x: [*b, t, h, d] queries or keys, d even.
    positions: [t] or [*b, t] numbers.
    base: the slowest pair completes a turn in about 2π · base positions.
    kind: other frequencies or fewer channels, in place of `base`.

  Returns:
    [*b, t, h, d] in the dtype of `x`; the angles are in float32.

  Raises:
    ValueError: the number of rotated channels is odd or larger than d, or the
      shape of `positions` doesn't fit.
  """
  x, positions = jnp.asarray(x), jnp.asarray(positions)
  kind = Rotary(base=base) if kind is None else kind
  width = x.shape[-1]
  size = width if kind.num_channels is None else kind.num_channels
  if size % 2 or not 0 < size <= width:
    raise ValueError(
      f'x: expected an even number of channels, got {size}'
      if size == width
      else f'num_channels: expected an even number up to {width}, got {size}'
    )
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
  frequencies = jnp.asarray(kind.frequencies(size), jnp.float32)
  angles = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = kind.scale * jnp.cos(angles), kind.scale * jnp.sin(angles)
  rotated, rest = x[..., :size], x[..., size:]
  exact = rotated.astype(jnp.float32)
  if kind.pairs == 'halves':
    a, b = jnp.split(exact, 2, axis=-1)
  else:
    a, b = exact[..., 0::2], exact[..., 1::2]
  pairs = a * cos - b * sin, a * sin + b * cos
  if kind.pairs == 'halves':
    turned = jnp.concatenate(pairs, axis=-1)
  else:
    turned = jnp.stack(pairs, axis=-1).reshape(rotated.shape)
  turned = turned.astype(x.dtype)
  return jnp.concatenate([turned, rest], -1) if size < width else turned
