"""Dropout: drops what it says, by chance, and nothing else."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.modules.layers import dropout


def _drop(x, rate=0.3, is_training=True, seed=0):
  layer = hk.transform(lambda x: dropout(x, rate, is_training))
  return layer.apply({}, jax.random.key(seed), x)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
  y = np.asarray(_drop(jnp.ones((7, 101, 211)), rate))
  assert set(np.unique(y)) == {0, np.float32(1 / (1 - rate))}
  deviation = (rate * (1 - rate) / y.size) ** 0.5
  assert abs((y == 0).mean() - rate) < 5 * deviation


def test_dropout_is_independent_of_place():
  dropped = np.asarray(_drop(jnp.ones((64, 1031, 64)), 0.5)) == 0
  signs = 1.0 - 2 * dropped
  deviation = signs.size**-0.5
  for shift in (1, 2, 3, 7, 16, 32):
    for axis in range(3):
      products = signs * np.roll(signs, shift, axis)
      assert abs(products.mean()) < 5 * deviation, (shift, axis)
      # Corners of a rectangle, where hashes that are sums give themselves away.
      squares = products * np.roll(products, shift, axis - 1)
      assert abs(squares.mean()) < 5 * deviation, (shift, axis)
  other = 1 - 2 * (np.asarray(_drop(jnp.ones(signs.shape), 0.5, seed=1)) == 0)
  assert abs((signs * other).mean()) < 5 * deviation


def test_dropout_gradient_goes_where_the_output_came_from():
  x = jax.random.normal(jax.random.key(1), (5, 13)) + 10
  gradient = jax.grad(lambda x: _drop(x).sum())(x)
  np.testing.assert_allclose(gradient, _drop(x) / x, rtol=1e-6)


def test_dropout_keeps_the_dtype_and_rests_when_not_training():
  x = jnp.ones((3, 5), jnp.bfloat16)
  assert _drop(x).dtype == jnp.bfloat16
  assert _drop(x, is_training=False) is x
  assert _drop(x, rate=0.0) is x


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('rate', [1.0, 1.5, -0.1, float('nan')])
def test_rates_that_cannot_be_are_refused(rate, is_training):
  with pytest.raises(ValueError, match=rf'expected \[0, 1\), got {rate}'):
    _drop(jnp.ones((3, 5)), rate, is_training)
