import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention


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
