import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention

B, T, K, M = 3, 5, 7, 12


def _apply(make, *inputs, **kwargs):
  model = hk.transform(lambda *x: make()(*x, **kwargs))
  params = model.init(jax.random.key(0), *inputs)
  return params, model.apply(params, jax.random.key(1), *inputs)


@pytest.mark.parametrize('is_cross', [False, True])
@pytest.mark.parametrize('sizes', [{}, {'value_size': 5, 'model_size': 7}])
def test_parameters_of_haikus_attention_give_its_output(
  arrays, assert_close, is_cross, sizes
):
  query, key = arrays((B, T, M), (B, K, M))
  key = key if is_cross else query
  mask = np.arange(key.shape[1]) <= np.arange(T)[:, None]
  theirs = hk.transform(
    lambda: hk.MultiHeadAttention(
      3, 4, w_init=hk.initializers.VarianceScaling(), name='attention', **sizes
    )(query, key, key, mask=jnp.asarray(mask)[None, None])
  )
  ours = hk.transform(
    lambda: attention.MultiHeadAttention(
      num_heads=3, key_size=4, name='attention', **({'model_size': M} | sizes)
    )(query, key, mask=mask)
  )
  rng = jax.random.key(0)
  params = theirs.init(rng)
  assert jax.tree.map(jnp.shape, ours.init(rng)) == jax.tree.map(
    jnp.shape, params
  )
  assert_close(ours.apply(params, rng), theirs.apply(params, rng))


def test_fused_projection_is_the_three_side_by_side(arrays, assert_close):
  query, key = arrays((B, T, M), (B, K, M))
  fields = dict(num_heads=6, num_kv_heads=2, value_size=5, name='attention')

  def run(params, inputs, **more):
    model = hk.transform(
      lambda *x: attention.MultiHeadAttention(**fields, **more)(*x)
    )
    params = params or model.init(jax.random.key(0), *inputs)
    return params, model.apply(params, None, *inputs)

  for inputs in ((query,), (query, key), (query, key, 2 * key)):
    params, expected = run(None, inputs)
    fused = {
      'attention/qkv': {
        leaf: jnp.concatenate(
          [params[f'attention/{n}'][leaf] for n in ('query', 'key', 'value')],
          axis=-1,
        )
        for leaf in 'wb'
      },
      'attention/linear': params['attention/linear'],
    }
    assert_close(run(fused, inputs, fused_qkv=True)[1], expected)


def test_wide_heads_may_exceed_the_model(arrays):
  (x,) = arrays((B, T, M))
  params, output = _apply(
    lambda: attention.MultiHeadAttention(num_heads=2, key_size=3 * M), x
  )
  assert output.shape == x.shape
  assert params['multi_head_attention/query']['w'].shape == (M, 6 * M)


def test_padding_never_changes_an_output(arrays, assert_close):
  (x,) = arrays((B, T, M))
  model = hk.transform(
    lambda x, mask: attention.MultiHeadAttention(num_heads=3)(x, mask=mask)
  )
  mask = attention.Mask.lengths(key_lengths=np.full(B, T))
  params = model.init(jax.random.key(0), x, mask)
  padded = jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=99.0)
  output = model.apply(params, None, padded, mask)[:, :T]
  assert_close(output, model.apply(params, None, x, mask))


def test_attention_goes_through_one_method_that_interceptors_see(arrays):
  (x,) = arrays((B, T, M))
  seen = []

  def intercept(method, args, kwargs, context):
    if context.method_name == 'attend':
      seen.append([a.shape for a in args])
    return method(*args, **kwargs)

  with hk.intercept_methods(intercept):
    _apply(lambda: attention.MultiHeadAttention(num_heads=3), x)
  assert seen == [[(B, T, 3, 4)] * 3] * 2


def test_dropout_is_for_training_alone(arrays):
  (x,) = arrays((B, T, M))

  def make():
    return attention.MultiHeadAttention(num_heads=3, dropout_rate=0.5)

  plain = _apply(lambda: attention.MultiHeadAttention(num_heads=3), x)[1]
  np.testing.assert_array_equal(_apply(make, x)[1], plain)
  assert np.abs(_apply(make, x, is_training=True)[1] - plain).max() > 1e-2


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(num_heads=5), 'num_heads: expected a divisor of the width 12, got 5'),
    (dict(num_heads=6, num_kv_heads=4), 'num_kv_heads: .* num_heads=6, got 4'),
  ],
)
def test_heads_that_do_not_divide_are_refused(arrays, fields, message):
  (x,) = arrays((B, T, M))
  with pytest.raises(ValueError, match=message):
    _apply(lambda: attention.MultiHeadAttention(**fields), x)


def test_fused_projection_refuses_two_widths(arrays):
  with pytest.raises(ValueError, match=r'fused_qkv: .*\[12, 9, 9\]'):
    _apply(
      lambda: attention.MultiHeadAttention(num_heads=3, fused_qkv=True),
      *arrays((B, T, M), (B, K, 9)),
    )
