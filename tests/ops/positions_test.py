import jax.numpy as jnp
import numpy as np
import pytest

import attention


def test_sinusoidal_is_the_papers_formula(assert_close):
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


def test_a_later_position_is_a_rotation_of_an_earlier_one(assert_close):
  size, shift = 8, 5
  code = attention.sinusoidal(20, size)
  angles = shift / 10_000 ** (jnp.arange(0, size, 2) / size)
  sine, cosine = code[:-shift, 0::2], code[:-shift, 1::2]
  rotated = sine * jnp.cos(angles) + cosine * jnp.sin(angles)
  assert_close(rotated, code[shift:, 0::2])


@pytest.mark.parametrize('arguments', [(0, 4), (4, -1)])
def test_sinusoidal_refuses_empty_sizes(arguments):
  with pytest.raises(ValueError, match='expected a positive int'):
    attention.sinusoidal(*arguments)
