"""Low-rank updates: exact at the start, merged, differentiated, named."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import models
from attention.modules import lora
from attention.modules.layers import Linear
from attention.modules.lora import Lora
from attention.ops.cache import Cache

_FIELDS = dict(
  vocab_size=13,
  context_size=11,
  num_layers=2,
  num_heads=2,
  model_size=10,
  with_tied_output=False,
)
_LORA = dict(rank=3, alpha=5.0)
_TOKENS = np.random.default_rng(0).integers(0, 13, (3, 7))


def _gpt(**fields):
  def forward(tokens, **more):
    return models.create('gpt', **(_FIELDS | fields))(tokens, **more)

  return hk.transform(forward)


def _params(model, *inputs, scale=0.3):
  """Random parameters, none of them zero."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  chance = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(chance.normal(size=x.shape) * scale, x.dtype), shapes
  )


@pytest.fixture(scope='module')
def adapted():
  """A GPT's random parameters with updates, and its logits."""
  model = _gpt(lora=_LORA)
  params = _params(model, _TOKENS)
  return params, jax.jit(model.apply)(params, None, _TOKENS)


def test_a_new_model_computes_what_it_did_without_updates():
  model, plain = _gpt(lora=_LORA), _gpt()
  params = jax.jit(model.init)(jax.random.key(0), _TOKENS)
  updates, base = hk.data_structures.partition(lora.is_adapter, params)
  shapes = jax.eval_shape(plain.init, jax.random.key(0), _TOKENS)
  assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, shapes)
  assert {m.split('/')[-1] for m in updates} == {
    'qkv', 'linear', 'expand', 'contract'
  }  # fmt: skip
  np.testing.assert_array_equal(
    jax.jit(model.apply)(params, None, _TOKENS),
    jax.jit(plain.apply)(base, None, _TOKENS),
  )
  draws = updates['gpt/block_0/contract']['lora_a']
  assert draws.shape == (40, 3)
  assert 0.9 < np.abs(draws).max() * np.sqrt(40) <= 1
  assert not updates['gpt/block_0/contract']['lora_b'].any()


def test_merged_weights_compute_the_same(adapted, assert_close):
  params, logits = adapted
  merged = lora.merge(params, alpha=5.0)
  assert not hk.data_structures.partition(lora.is_adapter, merged)[0]
  assert_close(jax.jit(_gpt().apply)(merged, None, _TOKENS), logits)
  leaves = params['gpt/block_1/expand']
  a, b = (np.asarray(leaves[f'lora_{x}'], np.float64) for x in 'ab')
  np.testing.assert_allclose(
    merged['gpt/block_1/expand']['w'], leaves['w'] + 5 / 3 * a @ b, rtol=1e-5
  )


def test_merge_adds_in_float32_and_keeps_dtypes():
  one = jnp.ones((1, 1), jnp.bfloat16)
  layer = {'w': one, 'lora_a': one * 2**-9, 'lora_b': one * 3}
  merged = lora.merge({'line': layer}, alpha=1.0)['line']['w']
  assert merged.dtype == jnp.bfloat16
  assert merged == 1 + 2**-7  # 1 + 3 / 512, rounded once


def test_gradients_are_those_of_the_merged_weights(adapted, assert_close):
  params, _ = adapted
  updates, base = hk.data_structures.partition(lora.is_adapter, params)

  def loss(updates, apply, change):
    params = change(hk.data_structures.merge(base, updates))
    return jnp.square(apply(params, None, _TOKENS)).mean()

  actual, expected = (
    jax.jit(jax.grad(lambda u, a=model.apply, c=change: loss(u, a, c)))(updates)
    for model, change in (
      (_gpt(lora=_LORA), lambda p: p),
      (_gpt(), lambda p: lora.merge(p, alpha=5.0)),
    )
  )
  jax.tree.map(assert_close, actual, expected)


@pytest.mark.parametrize(
  'way', [dict(use_scan=True), dict(use_scan=True, use_remat=True)]
)
def test_scan_and_remat_change_nothing(way, adapted, assert_close):
  params, logits = adapted
  model = _gpt(lora=_LORA, **way)
  shapes = jax.eval_shape(model.init, jax.random.key(0), _TOKENS)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  assert_close(jax.jit(model.apply)(params, None, _TOKENS), logits)


def test_a_cache_changes_nothing(adapted, assert_close):
  params, logits = adapted
  model = _gpt(lora=_LORA)

  @jax.jit
  def read(params):
    cache = Cache.create(7)
    first, cache = model.apply(params, None, _TOKENS[:, :5], cache=cache)
    rest, _ = model.apply(params, None, _TOKENS[:, 5:], cache=cache)
    return jnp.concatenate([first, rest], 1)

  assert_close(read(params), logits)


def test_patterns_are_those_of_the_merged_weights(adapted, assert_close):
  params, logits = adapted

  def patterns(model, params):
    return jax.jit(lambda p: attention.capture(model, p, _TOKENS))(params)

  output, found = patterns(_gpt(lora=_LORA), params)
  _, expected = patterns(_gpt(), lora.merge(params, alpha=5.0))
  assert_close(output, logits)
  jax.tree.map(assert_close, found, expected)


def test_chosen_layers_of_any_function_are_adapted(arrays, assert_close):
  def forward(x):
    with Lora(rank=2, alpha=1.0, projections=('one', 'three')).applied():
      x = hk.Linear(5, name='one')(inputs=x)
      return Linear(3, name='three')(Linear(7, name='two')(x))

  model = hk.without_apply_rng(hk.transform(forward))
  (x,) = arrays((4, 11))
  params = _params(model, x)
  updates, _ = hk.data_structures.partition(lora.is_adapter, params)
  assert jax.tree.map(jnp.shape, updates) == {
    'one': {'lora_a': (11, 2), 'lora_b': (2, 5)},
    'three': {'lora_a': (7, 2), 'lora_b': (2, 3)},
  }
  y = x
  merged = lora.merge(params, alpha=1.0)
  for name in ('one', 'two', 'three'):
    y = y @ merged[name]['w'] + merged[name]['b']
  assert_close(jax.jit(model.apply)(params, x), y)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(rank=-1), 'lora.rank: expected 0 or more, got -1'),
    (dict(rank=1, alpha=0.0), 'lora.alpha: expected above 0, got 0.0'),
    (
      dict(rank=1, projections='query'),
      r"expected names such as \('query', 'value'\), got 'query'",
    ),
    (
      dict(rank=1, projections=('qkv', 'query')),
      r"lora.projections: expected names among \['contract', 'expand', "
      r"'linear', 'output', 'qkv'\], .* got 'query'",
    ),
    (
      dict(rnk=1),
      "model.lora.rnk: Lora has no such field; did you mean 'rank",
    ),
  ],
)
def test_impossible_fields_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(_gpt(lora=fields).init, jax.random.key(0), _TOKENS)


def test_a_model_without_such_layers_raises():
  def forward(x):
    with Lora(rank=1).applied():
      return hk.Linear(5, name='other')(x)

  init = hk.transform(forward).init
  with pytest.raises(ValueError, match=r"among \['other'\], .* got 'query'"):
    jax.eval_shape(init, jax.random.key(0), np.zeros((1, 2), np.float32))


def test_rank_0_has_no_updates():
  model = _gpt(lora=dict(rank=0, projections=('none',)))
  shapes = jax.eval_shape(model.init, jax.random.key(0), _TOKENS)
  assert not hk.data_structures.partition(lora.is_adapter, shapes)[0]
