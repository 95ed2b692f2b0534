"""Dropout drops what it says, by chance; what is shared adds up in float32."""

import re

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.modules.layers import (
  Embed,
  Linear,
  add,
  cast_weights,
  dropout,
  linear,
)


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


def _shared(params, tokens):
  """Sums over all tokens of what a table, a bias and positions give."""
  x = Embed(3, 5, name='tokens')(tokens)
  x = Linear(7)(add(x, hk.get_parameter('positions', (5,), init=jnp.ones)))
  return linear(x, params['weights'], params['bias'])


def test_gradients_of_what_many_share_add_up_in_float32(assert_close):
  model = hk.without_apply_rng(hk.transform(_shared))
  tokens = np.zeros((8, 512), int)
  rest = {'weights': jnp.ones((7, 2)), 'bias': jnp.zeros(2)}
  params = model.init(jax.random.key(0), rest, tokens), rest

  def gradients_of(dtype):
    def loss(params):
      cast = jax.tree.map(lambda p: p.astype(dtype), params)
      outputs = model.apply(*cast, tokens)
      assert outputs.dtype == dtype
      return 0.01 * outputs.astype(jnp.float32).sum()

    return jax.grad(loss)

  exact, mixed = (gradients_of(dtype) for dtype in ('float32', 'bfloat16'))
  for x, y in zip(
    *(jax.tree.leaves(jax.jit(f)(params)) for f in (mixed, exact)), strict=True
  ):
    assert_close(x, y, 'bfloat16')
  # Some compilers add up some of bfloat16 in float32 anyway.
  program = str(jax.make_jaxpr(mixed)(params))
  assert not re.search(r':bf16\[.*\] = (reduce_sum|scatter-add)', program)
  assert 'scatter-add' in program


def test_weights_in_bfloat16_leave_activations_in_float32(assert_close):
  def model(ids):
    x = Embed(5, 16, name='embed')(ids)
    return Linear(7, name='layer')(x)

  model = hk.without_apply_rng(hk.transform(model))
  ids = jnp.arange(3)
  params = model.init(jax.random.key(0), ids)
  small = cast_weights(params, jnp.bfloat16)
  dtypes = jax.tree.map(lambda x: x.dtype.name, small)
  assert dtypes == {
    'embed': {'embeddings': 'float32'},
    'layer': {'w': 'bfloat16', 'b': 'float32'},
  }
  output = model.apply(small, ids)
  assert output.dtype == jnp.float32
  assert_close(output, model.apply(params, ids), 'bfloat16')
