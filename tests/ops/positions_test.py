import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.ops.positions import Rotary


def test_sinusoidal_matches_paper(assert_close):
  code = attention.sinusoidal(11, 6)
  for position in range(11):
    for i in range(3):
      angle = position / 10_000 ** (2 * i / 6)
      assert abs(code[position, 2 * i] - np.sin(angle)) < 1e-5
      assert abs(code[position, 2 * i + 1] - np.cos(angle)) < 1e-5


def test_sinusoidal_of_odd_size_ends_with_a_sine():
  code = attention.sinusoidal(3, 5)
  assert code.shape == (3, 5)
  assert abs(code[2, 4] - np.sin(2 / 10_000 ** (4 / 5))) < 1e-6


def test_sinusoidal_is_float32_under_x64():
  expected = attention.sinusoidal(11, 6)
  with jax.enable_x64(True):
    code = attention.sinusoidal(11, 6)
  assert code.dtype == 'float32'
  np.testing.assert_array_equal(code, expected)


def test_later_position_is_a_rotation_of_an_earlier_one(assert_close):
  size, shift = 8, 5
  code = attention.sinusoidal(20, size)
  angles = shift / 10_000 ** (jnp.arange(0, size, 2) / size)
  sine, cosine = code[:-shift, 0::2], code[:-shift, 1::2]
  rotated = sine * jnp.cos(angles) + cosine * jnp.sin(angles)
  assert_close(rotated, code[shift:, 0::2])


@pytest.mark.parametrize('arguments', [(0, 4), (4, -1)])
def test_sinusoidal_of_invalid_sizes_raises(arguments):
  with pytest.raises(ValueError, match='expected a positive int'):
    attention.sinusoidal(*arguments)


def test_rotary_products_depend_only_on_distance(arrays, assert_close):
  query, key = arrays((2, 5, 3, 8), (2, 5, 3, 8))

  def products(shift):
    positions = np.arange(5) + shift
    q = attention.rotary(query, positions)
    k = attention.rotary(key, positions)
    return jnp.einsum('bqhd,bkhd->bhqk', q, k)

  assert_close(products(0), products(1000), scale=3)
  assert np.abs(products(0) - jnp.einsum('bqhd,bkhd->bhqk', query, key)).max()


def test_rotary_matches_complex_product(arrays, assert_close):
  (x,) = arrays((2, 5, 3, 6))
  positions = np.array([[0, 1, 5, 2, 9], [3, 3, 0, 7, 1]])
  pairs = np.asarray(x[..., ::2]) + 1j * np.asarray(x[..., 1::2])
  turns = positions[..., None, None] * 10_000.0 ** (-np.arange(3) / 3)
  pairs = pairs * np.exp(1j * turns)
  actual = attention.rotary(x, positions)
  assert_close(actual[..., ::2], pairs.real)
  assert_close(actual[..., 1::2], pairs.imag)
  assert attention.rotary(x.astype(jnp.bfloat16), positions).dtype == 'bfloat16'


def test_rotary_of_invalid_shapes_raises(arrays):
  (x,) = arrays((2, 5, 3, 6))
  with pytest.raises(ValueError, match='even number of channels, got 5'):
    attention.rotary(x[..., :5], np.arange(5))
  for shape in [(), (4,), (3, 5), (2, 5, 3)]:
    with pytest.raises(ValueError, match='positions: expected a shape'):
      attention.rotary(x, np.zeros(shape))


def _llama3(frequency, factor, low, high, length):
  """Llama 3.1's rule, by wavelength."""
  wavelength = 2 * np.pi / frequency
  if wavelength < length / high:
    return frequency
  if wavelength > length / low:
    return frequency / factor
  smooth = (length / wavelength - low) / (high - low)
  return (1 - smooth) * frequency / factor + smooth * frequency


def test_scaled_rotary_frequencies_match_their_definitions():
  plain = Rotary(base=5e5).frequencies(128)
  np.testing.assert_allclose(plain, 5e5 ** (-np.arange(64) / 64))
  linear = Rotary(base=5e5, scaling='linear', factor=4).frequencies(128)
  np.testing.assert_allclose(linear, plain / 4)
  llama = Rotary(
    base=5e5, scaling='llama3', factor=8, original_length=8192
  ).frequencies(128)
  expected = [_llama3(f, 8, 1, 4, 8192) for f in plain]
  np.testing.assert_allclose(llama, expected)
  assert llama[0] == plain[0] and llama[-1] == plain[-1] / 8
  is_between = (llama < plain) & (llama > plain / 8 * (1 + 1e-9))
  assert 3 < is_between.sum() < 20


def test_yarn_keeps_pairs_that_turn_often_and_slows_the_others():
  kind = Rotary(base=1e4, scaling='yarn', factor=4, original_length=4096)
  plain, scaled = Rotary().frequencies(64), kind.frequencies(64)
  turns = 4096 * plain / (2 * np.pi)
  # The bounds are rounded outwards, by less than a pair.
  ratio = 1e4 ** (2 / 64)
  is_fast, is_slow = turns > 32 * ratio, turns < 1 / ratio
  np.testing.assert_allclose(scaled[is_fast], plain[is_fast])
  np.testing.assert_allclose(scaled[is_slow], plain[is_slow] / 4)
  assert is_fast.sum() > 5 and is_slow.sum() > 5
  kept = (scaled - plain / 4) / (plain * 3 / 4)
  between = kept[(kept > 1e-9) & (kept < 1 - 1e-9)]
  np.testing.assert_allclose(np.diff(between, 2), 0, atol=1e-9)
  assert len(between) > 3
  assert kind.scale == pytest.approx(0.1 * np.log(4) + 1)
  exact = dataclasses.replace(kind, with_whole_pairs=False).frequencies(64)
  assert (exact != scaled).any()
  assert dataclasses.replace(kind, amplitude=1.0).scale == 1.0


def test_part_of_the_channels_can_be_rotated(arrays, assert_close):
  (x,) = arrays((2, 5, 3, 8))
  positions = np.arange(5)
  actual = attention.rotary(x, positions, kind=Rotary(num_channels=4))
  np.testing.assert_array_equal(actual[..., 4:], x[..., 4:])
  assert_close(actual[..., :4], attention.rotary(x[..., :4], positions))
  scaled = attention.rotary(x, positions, kind=Rotary(amplitude=1.5))
  assert_close(scaled, 1.5 * attention.rotary(x, positions), scale=3)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'scaling': 'ntk'}, "scaling: expected one of .* got 'ntk'"),
    ({'factor': 0.0}, 'factor: expected a number above 0, got 0.0'),
    ({'low_frequency': 4.0}, 'low_frequency: expected less than high_freq'),
    ({'num_channels': 10}, 'num_channels: expected an even number up to 8'),
    ({'num_channels': 3}, 'num_channels: expected an even number up to 8'),
  ],
)
def test_impossible_rotary_fields_raise(arrays, fields, message):
  (x,) = arrays((2, 5, 3, 8))
  with pytest.raises(ValueError, match=message):
    attention.rotary(x, np.arange(5), kind=Rotary(**fields))
