"""Ways to run a model that change its cost and not its loss."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import models
from attention.models.losses import cross_entropy
from attention.training.optimization import precision

_FIELDS = dict(
  vocab_size=13, context_size=11, num_layers=2, num_heads=2, model_size=10
)
_WAYS = {
  'scan': dict(use_scan=True),
  'remat': dict(use_remat=True),
  'both': dict(use_scan=True, use_remat=True),
}


def _model(**fields):
  return hk.transform(
    lambda tokens, is_training=False: models.create(
      'gpt', **(_FIELDS | fields)
    )(tokens, is_training=is_training)
  )


def _loss(model):
  tokens = np.random.default_rng(0).integers(0, 13, (3, 8))
  tokens = jnp.asarray(tokens)

  def loss(params):
    logits = model.apply(params, None, tokens[:, :-1])
    total, count = cross_entropy(logits, tokens[:, 1:])
    return total / count

  return loss


def _params(model):
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), int))
  return jax.tree.map(lambda p: 5 * p, params)


@pytest.fixture(scope='module')
def plain():
  """The plain model's parameters, and its loss and gradients."""
  model = _model()
  params = _params(model)
  return params, jax.jit(jax.value_and_grad(_loss(model)))(params)


@pytest.mark.parametrize('way', _WAYS)
def test_a_way_changes_neither_parameters_nor_loss(way, plain, assert_close):
  params, expected = plain
  other = _model(**_WAYS[way])
  jax.tree.map(np.testing.assert_array_equal, _params(other), params)
  jax.tree.map(
    assert_close, jax.jit(jax.value_and_grad(_loss(other)))(params), expected
  )
  # With dropout, it runs: its random numbers are others under scan.
  other = _model(dropout_rate=0.5, **_WAYS[way])
  logits = jax.jit(other.apply, static_argnums=3)(
    params, jax.random.key(0), np.zeros((1, 4), int), True
  )
  assert np.isfinite(logits).all()


def test_scan_repeats_a_pattern_of_windows(assert_close):
  fields = dict(
    num_layers=5, window=3, window_pattern='wwf', output_logit_cap=2.0
  )
  plain = _model(**fields, positions='alibi', with_scaled_embeddings=True)
  other = _model(
    **fields, positions='alibi', with_scaled_embeddings=True, use_scan=True
  )
  params = _params(plain)
  jax.tree.map(np.testing.assert_array_equal, _params(other), params)
  expected, got = (
    jax.jit(jax.value_and_grad(_loss(model)))(params)
    for model in (plain, other)
  )
  jax.tree.map(assert_close, got, expected)


def test_remat_holds_less_and_scan_compiles_less():
  compiled = {}
  fields = dict(num_layers=9, context_size=64, model_size=32)
  tokens = np.zeros((4, 64), int)
  for way in ('plain', 'scan', 'both'):
    model = _model(**fields, **_WAYS.get(way, {}))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :2])

    def loss(params, model=model):
      return model.apply(params, None, tokens).mean()

    compiled[way] = jax.jit(jax.grad(loss)).lower(shapes).compile()
  memory = {
    way: program.memory_analysis().temp_size_in_bytes
    for way, program in compiled.items()
  }
  assert memory['both'] < 0.6 * memory['scan']
  length = {way: len(program.as_text()) for way, program in compiled.items()}
  assert length['scan'] < 0.7 * length['plain']


@pytest.mark.parametrize('way', ['plain', 'both'])
def test_a_policy_computes_in_its_dtype(way, assert_close):
  model = _model(**_WAYS.get(way, {}))
  params = _params(model)
  expected = jax.jit(_loss(model))(params)
  policy = 'params=float32,compute=bfloat16,output=float32'
  with precision.applied(policy):
    jax.tree.map(np.testing.assert_array_equal, _params(model), params)
    tokens = np.zeros((1, 4), int)
    logits = jax.eval_shape(model.apply, params, None, tokens)
    assert logits.dtype == jnp.float32
    program = str(jax.make_jaxpr(_loss(model))(params))
    assert 'bf16[10,30]' in program  # the fused projection's weights
    assert_close(jax.jit(_loss(model))(params), expected, 'bfloat16')
  assert 'bf16' not in str(jax.make_jaxpr(_loss(model))(params))


@pytest.mark.parametrize('way', ['plain', 'both', 'lora'])
def test_products_alone_in_bfloat16_stay_near_float32(way, assert_close):
  lora = {'lora': {'rank': 3}} if way == 'lora' else {}
  model = _model(**_WAYS.get(way, lora))
  params = _params(model)
  expected = jax.jit(jax.value_and_grad(_loss(model)))(params)
  with precision.applied('products=bfloat16'):
    jax.tree.map(np.testing.assert_array_equal, _params(model), params)
    program = jax.jit(jax.value_and_grad(_loss(model)))
    text = str(jax.make_jaxpr(_loss(model))(params))
    loss, gradients = program(params)
  assert 'bf16[10,30]' in text  # the fused projection's weights
  assert 'bf16[10,13]' in text  # the output's
  assert ('bf16[10,3]' in text) == (way == 'lora')
  assert 'bf16[3,7,10]' not in text  # activations
  assert loss != expected[0]
  jax.tree.map(
    lambda a, b: assert_close(a, b, 'bfloat16', 5),
    (loss, gradients),
    expected,
  )
  assert 'bf16' not in str(jax.make_jaxpr(_loss(model))(params))
