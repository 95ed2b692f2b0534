import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import models

B, T, C, M = 3, 7, 5, 12
SIZES = dict(
  num_classes=11, context_size=T, num_layers=2, num_heads=3, model_size=M
)


def _build(inputs, lengths=None, **fields):
  model = hk.transform(
    lambda *x: models.create('classifier', **SIZES | fields)(*x)
  )
  params = jax.jit(model.init)(jax.random.key(0), inputs, lengths)
  # The output's small start would hide differences.
  params['classifier/output']['w'] *= 50
  return lambda *x: jax.jit(model.apply)(params, None, *x)


@pytest.mark.parametrize('mixer', ['attention', 'lstm', 'conv'])
@pytest.mark.parametrize('pooling', ['mean', 'first'])
def test_padding_never_changes_an_output(arrays, assert_close, mixer, pooling):
  if (mixer, pooling) != ('attention', 'first') and pooling == 'first':
    pytest.skip('looks back only')
  (inputs,) = arrays((B, T, C))
  lengths = np.array([T, 4, 2])
  apply = _build(inputs, lengths, mixer=mixer, pooling=pooling)
  whole = apply(inputs, lengths)
  assert whole.shape == (B, 11)
  noise = jnp.where(np.arange(T)[:, None] < lengths[:, None, None], inputs, 1e3)
  assert_close(apply(noise, lengths), whole)
  assert_close(apply(inputs[1:2, :4], None), whole[1:2])
  assert np.abs(apply(inputs, None)[1:] - whole[1:]).max() > 1e-3


def test_tokens_are_looked_up():
  tokens = jax.random.randint(jax.random.key(0), (B, T), 0, 13)
  apply = _build(tokens, vocab_size=13)
  one = apply(tokens)
  assert np.abs(apply(tokens.at[:, 3].set(0)) - one).max() > 1e-3


def test_bad_input_is_named():
  for fields, shape, message in (
    ({}, (B, T + 1, C), 'at most context_size=7 positions, got 8'),
    ({'num_heads': 5}, (B, T, C), 'divisor of model_size=12, got 5'),
    (
      {'pooling': 'last'},
      (B, T, C),
      "pooling: expected one of .*'mean'.*, got 'last'",
    ),
    ({'pooling': 'first', 'mixer': 'conv'}, (B, T, C), "mixer='conv'"),
    ({'mixer': 'mlp'}, (B, T, C), 'mixer: expected one of'),
  ):
    with pytest.raises(ValueError, match=message):
      _build(jnp.zeros(shape), **fields)
