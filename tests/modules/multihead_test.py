import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.modules.multihead import SIMILARITIES

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
    (dict(num_heads=0), 'num_heads: expected 1 or more, got 0'),
    (dict(num_heads=3, num_kv_heads=0), 'num_kv_heads: expected 1 or more'),
    (dict(num_heads=3, key_size=0), 'key_size: expected 1 or more, got 0'),
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


@pytest.mark.parametrize('similarity', SIMILARITIES)
def test_similarities_are_those_of_the_formula(
  arrays, assert_close, similarity
):
  (x,) = arrays((2, 5, 12))
  layer = lambda: attention.MultiHeadAttention(  # noqa: E731
    num_heads=3, similarity=similarity, with_bias=False, with_output_bias=False
  )
  params, _ = _apply(layer, x)
  params = {name.split('/')[-1]: p for name, p in params.items()}
  own = params.pop('multi_head_attention', {}).get('similarity_w')
  if own is not None:
    own = own + 0.3
  q, k, v = (
    np.asarray(x @ params[n]['w'], np.float64).reshape(2, 5, 3, 4)
    for n in ('query', 'key', 'value')
  )
  dots = np.einsum('bqhd,bkhd->bhqk', q, k)
  lengths = [
    np.linalg.norm(a, axis=-1).transpose(0, 2, 1)[..., None] for a in (q, k)
  ]
  logits = {
    'scaled_dot': lambda: dots / 2,
    'dot': lambda: dots,
    'cosine': lambda: dots / lengths[0] / lengths[1].swapaxes(-1, -2),
    'general': lambda: np.einsum('bqhc,hcd,bkhd->bhqk', q, own, k),
    'additive': lambda: np.einsum(
      'bqkhd,hd->bhqk', np.tanh(q[:, :, None] + k[:, None]), own
    ),
  }[similarity]()
  weights = np.asarray(jax.nn.softmax(logits))
  heads = np.einsum('bhqk,bkhd->bqhd', weights, v).reshape(2, 5, 12)
  expected = heads @ np.asarray(params['linear']['w'], np.float64)
  transformed = hk.without_apply_rng(hk.transform(lambda x: layer()(x)))
  tree = {f'multi_head_attention/{n}': p for n, p in params.items()}
  if own is not None:
    tree['multi_head_attention'] = {'similarity_w': own}
  assert_close(transformed.apply(tree, x), expected.astype(np.float32))


def test_general_begins_as_the_scaled_dot_product(arrays, assert_close):
  (x,) = arrays((2, 5, 12))
  fields = {'num_heads': 3}
  _, expected = _apply(lambda: attention.MultiHeadAttention(**fields), x)
  fields['similarity'] = 'general'
  _, actual = _apply(lambda: attention.MultiHeadAttention(**fields), x)
  assert_close(actual, expected)


def test_rotary_attention_moves_with_the_positions(arrays, assert_close):
  (x,) = arrays((2, 5, 12))
  layer = lambda: attention.MultiHeadAttention(  # noqa: E731
    num_heads=3, with_rotary=True
  )
  _, output = _apply(layer, x)
  _, shifted = _apply(layer, x, positions=np.arange(5) + 7)
  assert_close(shifted, output, scale=3)
  _, stretched = _apply(layer, x, positions=np.arange(5) * 7)
  assert np.abs(stretched - output).max() > 1e-3


def test_cached_keys_take_the_queries_positions(arrays, assert_close):
  (x,) = arrays((2, 5, 12))

  def pieces(x, with_key):
    layer = attention.MultiHeadAttention(num_heads=3, with_rotary=True)
    cache, outputs = attention.Cache.create(5), []
    for piece in (x[:, :3], x[:, 3:]):
      y, cache = layer(piece, piece + 0 if with_key else None, cache=cache)
      outputs.append(y)
    return jnp.concatenate(outputs, axis=1)

  _, expected = _apply(lambda: lambda x: pieces(x, False), x)
  _, actual = _apply(lambda: lambda x: pieces(x, True), x)
  assert_close(actual, expected)


def test_a_cache_of_another_kind_is_refused(arrays):
  (x,) = arrays((B, T, M))
  with pytest.raises(ValueError, match='cache: expected a Cache .* got dict'):
    _apply(lambda: attention.MultiHeadAttention(num_heads=3), x, cache={})


def test_full_value_maps_are_summed_over_heads(arrays, assert_close):
  (x,) = arrays((2, 5, 12))
  params, output = _apply(
    lambda: attention.MultiHeadAttention(
      num_heads=3, value_factorisation='full', with_bias=False
    ),
    x,
  )
  params = {name.split('/')[-1]: p['w'] for name, p in params.items()}
  assert params['value'].shape == (12, 3 * 12)
  q, k = ((x @ params[n]).reshape(2, 5, 3, 4) for n in ('query', 'key'))
  weights = attention.attention_weights(q, k)
  maps = params['value'].reshape(12, 3, 12)
  expected = jnp.einsum('bhqk,bkm,mho->bqo', weights, x, maps)
  assert_close(output, expected)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'similarity': 'dott'}, "similarity: expected one of .*got 'dott'"),
    ({'value_factorisation': 'half'}, 'value_factorisation: expected one of'),
    ({'value_factorisation': 'full', 'value_size': 3}, 'value_size: expected'),
    ({'with_rotary': True, 'key_size': 3}, 'even number of channels, got 3'),
    ({'rotary': {'bas': 5e5}}, "rotary.bas: no such field; .* 'base'"),
    ({'dropout_rate': 1.5}, r'dropout_rate: expected \[0, 1\), got 1.5'),
  ],
)
def test_unknown_choices_are_refused(arrays, fields, message):
  (x,) = arrays((2, 5, 12))
  with pytest.raises(ValueError, match=message):
    _apply(lambda: attention.MultiHeadAttention(num_heads=3, **fields), x)


def test_positions_without_rotary_codes_are_refused(arrays):
  (x,) = arrays((2, 5, 12))
  with pytest.raises(ValueError, match='set with_rotary=True'):
    _apply(
      lambda: attention.MultiHeadAttention(num_heads=3), x, positions=[0] * 5
    )
