"""Tests of capturing patterns from unmodified functions."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import models
from attention.modules import evoformer
from attention.modules.evoformer import EvoformerStack

B, T, K, M = 2, 5, 7, 12
MASK = np.tril(np.ones((T, T), bool))


def _attention(**fields):
  return lambda: attention.MultiHeadAttention(name='attention', **fields)


def _haiku_attention():
  return hk.MultiHeadAttention(
    3, 4, w_init=hk.initializers.VarianceScaling(), name='attention'
  )


def _split(params, name, x, num_heads):
  leaves = params[f'attention/{name}']
  x = x @ leaves['w'] + leaves['b']
  return x.reshape(*x.shape[:-1], num_heads, -1)


# name: (module, query heads, key heads, call(module, x, context))
CALLS = {
  'self': (_attention(num_heads=3), 3, 3, lambda m, x, _: m(x)),
  'causal': (
    _attention(num_heads=3, implementation='reference'),
    3,
    3,
    lambda m, x, _: m(x, mask=attention.Mask.causal()),
  ),
  'fully_masked': (
    _attention(num_heads=3, implementation='chunked'),
    3,
    3,
    lambda m, x, _: m(x, mask=attention.Mask.causal(-2)),
  ),
  'grouped_cross': (
    _attention(num_heads=6, num_kv_heads=2, value_size=3),
    6,
    2,
    lambda m, x, context: m(x, context),
  ),
  'additive': (
    _attention(num_heads=3, similarity='additive'),
    3,
    3,
    lambda m, x, _: m(x),
  ),
  'cosine': (
    _attention(num_heads=3, similarity='cosine', scale=4.0),
    3,
    3,
    lambda m, x, _: m(x),
  ),
  'bias': (
    _attention(num_heads=3),
    3,
    3,
    lambda m, x, _: m(x, bias=attention.alibi(3)),
  ),
  'haiku': (
    _haiku_attention,
    3,
    3,
    lambda m, x, _: m(x, x, x, jnp.asarray(MASK)[None, None]),
  ),
  'haiku_cross': (
    _haiku_attention,
    3,
    3,
    lambda m, x, context: m(x, context, context),
  ),
}
ARGUMENTS = {
  'cosine': {'scale': 4.0},
  'causal': {'mask': MASK},
  'haiku': {'mask': MASK},
  'fully_masked': {'mask': np.tril(np.ones((T, T), bool), -2)},
  'bias': {'bias': attention.alibi(3)},
}


def _init(function, *inputs):
  model = hk.transform(function)
  return model, jax.jit(model.init)(jax.random.key(0), *inputs)


@pytest.mark.parametrize('name', CALLS)
def test_captured_weights_match_the_call(name, arrays):
  make, num_heads, num_kv_heads, call = CALLS[name]
  x, context = arrays((B, T, M), (B, K, M))

  def function(x, context):
    return call(make(), x, context)

  model, params = _init(function, x, context)

  output, patterns = jax.jit(lambda *x: attention.capture(function, *x))(
    params, x, context
  )
  plain = jax.jit(model.apply)(params, None, x, context)
  np.testing.assert_allclose(output, plain, rtol=0, atol=1e-6)

  source = context if name.endswith('cross') else x
  query = _split(params, 'query', x, num_heads)
  key = _split(params, 'key', source, num_kv_heads)
  arguments = ARGUMENTS.get(name, {})
  if name == 'additive':
    vector = params['attention']['similarity_w']
    arguments = {'vector': vector, 'scale': 1.0}
  if name == 'cosine':
    query, key = (
      y / np.linalg.norm(y, axis=-1, keepdims=True) for y in (query, key)
    )
  expected = attention.attention_weights(query, key, **arguments)
  assert list(patterns) == ['attention']
  pattern = patterns['attention']
  assert pattern.dtype == jnp.float32
  np.testing.assert_allclose(pattern, expected, rtol=0, atol=1e-6)
  row_sums = np.ones(T)
  if name == 'fully_masked':
    row_sums[:2] = 0
  np.testing.assert_allclose(
    pattern.sum(-1), np.broadcast_to(row_sums, pattern.shape[:-1]), atol=1e-6
  )


def _mixed_calls(x):
  """A module called twice, a stack of layers, a rematerialised layer."""
  twice = attention.MultiHeadAttention(num_heads=3, name='twice')
  x = twice(twice(x), mask=attention.Mask.causal())
  x = hk.layer_stack(4)(attention.TransformerBlock(num_heads=2, name='block'))(
    x
  )
  return hk.remat(_attention(num_heads=3)())(x)


STACK = '__layer_stack_no_per_layer/block/attention'


@pytest.fixture(scope='module')
def mixed_calls():
  x = jax.random.normal(jax.random.key(0), (B, T, M))
  return *_init(_mixed_calls, x), x


def test_repeated_stacked_and_rematerialised_calls_are_captured(mixed_calls):
  model, params, x = mixed_calls
  output, patterns = jax.jit(lambda *x: attention.capture(_mixed_calls, *x))(
    params, x
  )
  assert jax.tree.map(jnp.shape, patterns) == {
    'twice': (B, 3, T, T),
    'twice#1': (B, 3, T, T),
    STACK: (4, B, 2, T, T),
    'attention': (B, 3, T, T),
  }
  np.testing.assert_allclose(
    output, model.apply(params, None, x), rtol=0, atol=2e-6
  )
  # Only the second call is causal.
  assert np.triu(patterns['twice'][0, 0], 1).any()
  assert not np.triu(patterns['twice#1'][0, 0], 1).any()
  # Each layer of the stack matches the same layer applied on its own.
  hidden = attention.capture(
    lambda x: _calls_before_the_stack(x),
    {k: v for k, v in params.items() if k.startswith('twice')},
    x,
  )[0]

  def block(x):
    return attention.TransformerBlock(num_heads=2, name='block')(x)

  for i in range(4):
    layer = {
      path.split('/', 1)[1]: jax.tree.map(lambda p, i=i: p[i], leaves)
      for path, leaves in params.items()
      if path.startswith('__layer_stack')
    }
    hidden, alone = attention.capture(block, layer, hidden)
    np.testing.assert_allclose(
      patterns[STACK][i], alone['block/attention'], rtol=0, atol=1e-6
    )


def _calls_before_the_stack(x):
  twice = attention.MultiHeadAttention(num_heads=3, name='twice')
  return twice(twice(x), mask=attention.Mask.causal())


@pytest.mark.parametrize(
  'layers, paths',
  [
    ('twice', ['twice']),
    ('twice*', ['twice', 'twice#1']),
    (['attention', STACK], [STACK, 'attention']),
    ([3, 0], ['twice', 'attention']),
  ],
)
def test_layers_heads_and_queries_are_selected(mixed_calls, layers, paths):
  _, params, x = mixed_calls

  def run(**selection):
    return jax.jit(
      lambda *x: attention.capture(_mixed_calls, *x, **selection)[1]
    )(params, x)

  whole = run()
  part = run(layers=layers, heads=[1], queries=[4, 2])
  assert sorted(part) == sorted(paths)
  for path in paths:
    np.testing.assert_allclose(
      part[path],
      whole[path][..., 1:2, [4, 2], :],
      rtol=0,
      atol=1e-6,
    )


def test_only_selected_patterns_are_computed(mixed_calls):
  _, params, x = mixed_calls
  jaxpr = jax.make_jaxpr(
    lambda: attention.capture(_mixed_calls, params, x, layers='twice')[0]
  )()
  more = jax.make_jaxpr(lambda: attention.capture(_mixed_calls, params, x)[0])()
  assert len(str(jaxpr)) < len(str(more))


def test_arguments_and_results_of_transform_are_supported(arrays):
  (x,) = arrays((B, T, M))

  def function(x, is_training):
    hk.set_state('calls', hk.get_state('calls', (), init=jnp.zeros) + 1)
    x = hk.dropout(hk.next_rng_key(), 0.5, x) if is_training else x
    return _attention(num_heads=3, dropout_rate=0.5)()(
      x, is_training=is_training
    )

  stateful = hk.transform_with_state(function)
  params, state = stateful.init(jax.random.key(0), x, False)
  rng = jax.random.key(1)
  for is_training in (False, True):
    expected = stateful.apply(params, state, rng, x, is_training)[0]
    for given in (function, stateful):
      output, patterns = attention.capture(
        given, params, x, is_training=is_training, rng=rng, state=state
      )
      np.testing.assert_array_equal(output, expected)
      # Patterns are without dropout, so rows sum to 1.
      np.testing.assert_allclose(
        patterns['attention'].sum(-1), 1, rtol=0, atol=1e-6
      )
  model, params = _init(lambda x: _attention(num_heads=3)()(x), x)
  for given in (model, hk.without_apply_rng(model)):
    assert attention.capture(given, params, x)[1]['attention'].shape[1] == 3


def test_bfloat16_gives_float32_patterns(arrays):
  (x,) = arrays((B, T, M), dtype=jnp.bfloat16)
  for make in (_attention(num_heads=3), _haiku_attention):

    def function(x, make=make):
      return make()(x, x, x) if make is _haiku_attention else make()(x)

    _, params = _init(function, x)
    pattern = attention.capture(function, params, x)[1]['attention']
    assert pattern.dtype == jnp.float32
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)


def test_missing_layers_heads_and_queries_raise(mixed_calls):
  _, params, x = mixed_calls
  for arguments, message in (
    ({'layers': 'twise'}, r"of 0: twice, 1: twice#1, 2: __.*, got 'twise'"),
    ({'layers': 4}, r'expected one of 0: twice, .* 3: attention, got 4'),
    ({'layers': -1}, r'layers: expected one of .*, got -1'),
    ({'layers': STACK, 'heads': 2}, r'heads: expected 0 to 1, got \[2\]'),
    ({'queries': [1, 5]}, r'queries: expected 0 to 4, got \[5\]'),
  ):
    with pytest.raises(ValueError, match=message):
      attention.capture(_mixed_calls, params, x, **arguments)


@pytest.mark.parametrize('layers', [None, 'attention'])
def test_function_without_attention_raises(arrays, layers):
  (x,) = arrays((B, M))

  def function(x):
    return hk.Linear(3)(x)

  _, params = _init(function, x)
  with pytest.raises(ValueError, match='at least one attention call'):
    attention.capture(function, params, x, layers=layers)


def test_evoformer_patterns_cover_all_rows_and_blocks(arrays):
  # More positions than the layers process at a time.
  num_seq, num_res, num_blocks = 53, 41, 2
  msa, pair = arrays((num_seq, num_res, 6), (num_res, num_res, 4))

  def function(msa, pair):
    return EvoformerStack(
      num_blocks=num_blocks, num_msa_head=3, num_pair_head=2, name='stack'
    )(msa, pair)

  model, params = _init(function, msa, pair)
  output, patterns = jax.jit(lambda *x: attention.capture(function, *x))(
    params, msa, pair
  )
  plain = jax.jit(model.apply)(params, None, msa, pair)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
    output,
    plain,
  )
  row = patterns['stack/msa_row_attention_with_pair_bias/attention']
  assert row.shape == (num_blocks, num_seq, 3, num_res, num_res)
  np.testing.assert_allclose(row.sum(-1), 1, atol=1e-5)
  assert len(patterns) == 4


def test_gated_attention_is_captured(arrays):
  x, bias = arrays((B, T, M), (3, T, T))
  mask = jnp.asarray([[True] * T, [True] * 3 + [False] * (T - 3)])
  mask = mask[:, None, None, :].at[0].set(False)

  def function(x, bias):
    return attention.GatedAttention(num_head=3, zero_init=False)(
      x, x, mask, bias
    )

  model, params = _init(function, x, bias)
  output, patterns = jax.jit(lambda *x: attention.capture(function, *x))(
    params, x, bias
  )
  expected = jax.jit(model.apply)(params, None, x, bias)
  np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6)
  leaves = params['gated_attention']
  query, key = (
    jnp.einsum('bta,ahc->bthc', x, leaves[f'{name}_w'])
    for name in ('query', 'key')
  )
  expected = attention.attention_weights(query, key, mask=mask, bias=bias)
  pattern = patterns['gated_attention']
  np.testing.assert_allclose(pattern, expected, rtol=0, atol=1e-6)
  assert not pattern[0].any()
  np.testing.assert_allclose(pattern[1].sum(-1), 1, rtol=0, atol=1e-6)


def test_global_attention_is_captured(arrays):
  (x,) = arrays((B, T, M))
  mask = jnp.ones((B, T, 1), bool).at[0, 2:].set(False)

  def function(x):
    return attention.GlobalAttention(num_head=3)(x, x, mask)

  _, params = _init(function, x)
  patterns = attention.capture(function, params, x)[1]
  pattern = patterns['global_attention']
  assert pattern.shape == (B, 3, 1, T)
  assert not pattern[0, ..., 2:].any()
  np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize('use_remat', [False, True])
def test_a_scanned_gpt_has_the_paths_of_one_that_is_not(use_remat):
  tokens = jnp.arange(2 * T).reshape(2, T)
  fields = dict(vocab_size=11, context_size=T, num_layers=3, num_heads=2)

  def function(tokens, **more):
    return models.create('gpt', model_size=M, **fields, **more)(tokens)

  _, params = _init(function, tokens)
  plain = attention.capture(function, params, tokens)[1]
  scanned = jax.jit(
    lambda *x: attention.capture(
      function, *x, use_scan=True, use_remat=use_remat
    )[1]
  )(params, tokens)
  assert list(scanned) == [f'gpt/block_{i}/attention' for i in range(3)]
  for path, pattern in plain.items():
    np.testing.assert_allclose(scanned[path], pattern, rtol=0, atol=1e-6)


def test_patterns_of_row_blocks_are_complete(arrays):
  # Enough rows for more than one block.
  msa, pair = arrays((50, 60, 4), (60, 60, 4))

  def function(msa, pair):
    return evoformer.MSARowAttentionWithPairBias(num_head=2)(
      msa, jnp.ones((50, 60), bool), pair
    )

  model, params = _init(function, msa, pair)
  output, patterns = jax.jit(
    lambda *x: attention.capture(function, *x, queries=[7])
  )(params, msa, pair)
  (pattern,) = patterns.values()
  assert pattern.shape == (50, 2, 1, 60)
  np.testing.assert_allclose(pattern.sum(-1), 1, rtol=0, atol=1e-6)
  expected = jax.jit(model.apply)(params, None, msa, pair)
  np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6)
