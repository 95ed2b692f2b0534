"""Every variant of the Transformer, in every model that has it."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import models
from attention.ops.cache import Cache

B, T, V = 2, 9, 11
_SHARED = dict(num_layers=1, num_heads=4, model_size=16, vocab_size=V)
_FIELDS = {
  'gpt': dict(context_size=T),
  'translator': dict(context_size=T),
  'classifier': dict(context_size=T, num_classes=3),
}
# Names of parameters that a variant adds to each model.
_VARIANTS = {
  'sinusoidal': (dict(positions='sinusoidal'), ''),
  'learned': (dict(positions='learned'), 'positions'),
  'rotary': (dict(positions='rotary'), ''),
  'alibi': (dict(positions='alibi'), ''),
  't5': (dict(positions='t5'), 'position_bias'),
  'none': (dict(positions='none'), ''),
  'post_rms': (dict(norm='post', norm_kind='rms'), ''),
  'swiglu': (dict(activation='swiglu', norm_kind='rms'), 'gate'),
  'window': (dict(window=3), ''),
  'cosine': (dict(attention=dict(similarity='cosine', scale=4.0)), ''),
  'additive': (dict(attention=dict(similarity='additive')), 'similarity_w'),
  'shared_heads': (dict(attention=dict(num_kv_heads=2)), ''),
  'qk_norm': (dict(attention=dict(with_qk_norm=True)), 'query_norm'),
  'sinks_cap': (
    dict(attention=dict(with_sinks=True, logit_cap=5.0)),
    'sinks',
  ),
  'full_values': (dict(attention=dict(value_factorisation='full')), ''),
  'gemma': (
    dict(
      num_layers=2,
      positions='rotary',
      norm='both',
      norm_kind='zero_centred_rms',
      norm_epsilon=1e-4,
      activation='geglu',
      with_feed_forward_bias=False,
      window=3,
      window_pattern='wf',
      window_attention=dict(rotary=dict(base=100.0)),
      attention=dict(with_qk_norm=True, key_size=6, with_bias=False),
    ),
    'attention_post_norm',
  ),
  'rotary_halves': (
    dict(
      positions='rotary',
      attention=dict(rotary=dict(pairs='halves', num_channels=2)),
    ),
    '',
  ),
  'experts': (
    dict(experts=dict(num_experts=3, num_active=2, hidden_size=6)),
    'experts',
  ),
}


# Models share their blocks, so what depends on the model is tested in each.
_CASES = [
  (name, variant)
  for name in _FIELDS
  for variant in _VARIANTS
  if name == 'gpt' or variant in ('learned', 'rotary', 't5', 'window')
]


def _model(name, **fields):
  """(model, params, inputs), with parameters far from where they start."""
  fields = _SHARED | _FIELDS[name] | fields
  model = hk.transform(
    lambda *inputs, **more: models.create(name, **fields)(*inputs, **more)
  )
  tokens = np.random.default_rng(0).integers(0, V, (B, T))
  inputs = (tokens,)
  if name == 'translator':
    inputs = (tokens[:, ::-1], tokens, np.array([T, 4]))
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  rng = np.random.default_rng(2)  # NumPy's: they need no compilation
  params = jax.tree.map(
    lambda x: jnp.asarray(
      2 / np.sqrt(x.shape[0]) * rng.normal(size=x.shape), x.dtype
    ),
    shapes,
  )
  model = hk.Transformed(model.init, jax.jit(model.apply))
  return model, params, inputs


@pytest.mark.parametrize(('name', 'variant'), _CASES)
def test_every_parameter_of_every_variant_is_trained(name, variant):
  fields, parameter = _VARIANTS[variant]
  model, params, inputs = _model(name, **fields)
  names = {f'{path}/{key}' for path, leaf in params.items() for key in leaf}
  assert any(parameter in x for x in names)

  @jax.jit
  def gradients(params):
    def loss(params):
      logits = model.apply(params, None, *inputs)
      weights = np.random.default_rng(1).normal(size=logits.shape)
      return (logits * weights).sum()

    return jax.grad(loss)(params)

  for path, leaf in gradients(params).items():
    for key, gradient in leaf.items():
      gradient = np.asarray(gradient)
      assert np.isfinite(gradient).all()
      # Softmax cancels the gradient of a key's bias; some codes are unused.
      if key != 'b' and key != 'sinks':
        assert gradient.any(), f'{path}/{key}'


@pytest.mark.parametrize(
  ('name', 'variant'), [c for c in _CASES if c[0] != 'classifier']
)
def test_cached_logits_equal_uncached_ones(name, variant, assert_close):
  fields, _ = _VARIANTS[variant]
  model, params, inputs = _model(name, **fields)
  index = 1 if name == 'translator' else 0

  @jax.jit
  def run(params, *inputs):
    whole = model.apply(params, None, *inputs)
    cache, at, pieces = Cache.create(T), 0, []
    for size in (4, 1, T - 5):
      piece = list(inputs)
      piece[index] = inputs[index][:, at : at + size]
      if at and name == 'translator':
        piece[0] = None
      logits, cache = model.apply(params, None, *piece, cache=cache)
      pieces.append(logits)
      at += size
    return whole, jnp.concatenate(pieces, 1)

  whole, pieces = run(params, *inputs)
  assert_close(pieces, whole, scale=5)


@pytest.mark.parametrize('kind', ['rotary', 'alibi', 't5', 'sinusoidal'])
def test_positions_change_what_a_gpt_computes(kind):
  model, params, (tokens,) = _model('gpt', positions=kind)
  swapped = tokens.copy()
  swapped[:, [0, 1]] = tokens[:, [1, 0]]
  one, two = (model.apply(params, None, x)[:, -1] for x in (tokens, swapped))
  assert np.abs(one - two).max() > 1e-4


def test_without_positions_earlier_tokens_are_a_set(assert_close):
  model, params, (tokens,) = _model('gpt', positions='none')
  swapped = tokens[:, [1, 0, *range(2, T)]]
  one, two = (model.apply(params, None, x)[:, -1] for x in (tokens, swapped))
  assert_close(one, two)


def test_a_window_bounds_the_reach_of_a_layer():
  model, params, _ = _model('gpt', window=3, with_tied_output=False)

  def logits_of_the_last(table):
    changed = {**params, 'gpt/tokens': {'embeddings': table}}
    return model.apply(changed, None, np.arange(T)[None])[0, -1].std()

  gradient = jax.jit(jax.grad(logits_of_the_last))(
    params['gpt/tokens']['embeddings']
  )
  reached = np.abs(gradient[:T]).max(-1) > 0
  assert reached.tolist() == [False] * (T - 3) + [True] * 3


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(positions='rotarry'), "positions: .*did you mean 'rotary'"),
    (dict(norm_kind='rsm'), "norm_kind: .*did you mean 'rms'"),
    (dict(activation='swigl'), "activation: .*did you mean 'swiglu'"),
    (dict(window=-1), 'window: expected 1 or more, got -1'),
    (dict(window=2, window_pattern='wg'), 'expected the letters w and f'),
    (
      dict(experts=dict(num_experts=2, num_active=3, hidden_size=4)),
      'experts.num_active: expected at most num_experts=2, got 3',
    ),
    (
      dict(attention=dict(rotary=dict(bas=1.0))),
      "model.attention.rotary.bas: .*did you mean 'base'",
    ),
    (dict(attention=dict(similarity='cosin')), "did you mean 'cosine'"),
    (dict(attention=dict(with_sink=True)), "did you mean 'with_sinks'"),
    (dict(attention=dict(num_heads=3)), 'model.attention.num_heads: '),
    (dict(attention=dict(num_kv_heads=3)), 'num_kv_heads: expected a divisor'),
  ],
)
def test_impossible_variants_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _model('gpt', **fields)


def test_zeros_and_empty_strings_are_the_defaults(assert_close):
  plain, params, (tokens,) = _model('gpt')
  same, others, _ = _model(
    'gpt',
    window=0,
    hidden_size=0,
    implementation='',
    attention=dict(num_kv_heads=0, logit_cap=0.0, with_bias=True),
  )
  assert jax.tree.structure(params) == jax.tree.structure(others)
  assert_close(
    same.apply(params, None, tokens), plain.apply(params, None, tokens)
  )
