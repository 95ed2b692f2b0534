import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding, models
from attention.models.gpt import window_step
from attention.models.losses import cross_entropy
from attention.ops.cache import Cache, align

_FIELDS = dict(
  vocab_size=13, context_size=11, num_layers=2, num_heads=2, model_size=10
)


@functools.cache
def _model(**fields):
  model = hk.transform(
    lambda tokens, **more: models.create('gpt', **(_FIELDS | fields))(
      tokens, **more
    )
  )
  model = hk.Transformed(model.init, jax.jit(model.apply))
  params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 2), int))
  return model, params


def test_no_gradient_comes_from_future_tokens():
  model, params = _model()
  tokens = np.arange(7)[None]

  def early(table):
    changed = params | {'gpt/tokens': {'embeddings': table}}
    return model.apply(changed, None, tokens)[:, :4, :].std()

  # Token ids are positions here, so the table's rows are the inputs. Tied, the
  # table is the output too, so untie it.
  model, params = _model(with_tied_output=False)
  grad = jax.grad(early)(params['gpt/tokens']['embeddings'])
  assert (np.abs(grad[:4]).max(-1) > 0).all()
  assert not np.asarray(grad[4:]).any()


def test_it_starts_as_gpt2_does():
  _, params = _model(model_size=64, vocab_size=997, context_size=101)
  assert abs(params['gpt/tokens']['embeddings'].std() / 0.02 - 1) < 0.03
  assert abs(params['gpt']['positions'].std() / 0.02 - 1) < 0.03
  for i in range(2):
    for name, std in (
      ('attention/qkv', 0.02),
      ('attention/linear', 0.02 / 4**0.5),
      ('expand', 0.02),
      ('contract', 0.02 / 4**0.5),
    ):
      layer = params[f'gpt/block_{i}/{name}']
      assert abs(layer['w'].std() / std - 1) < 0.06, name
      assert not layer['b'].any()


def test_a_tied_output_has_no_matrix_of_its_own():
  assert 'gpt/output' not in _model()[1]
  untied = _model(with_tied_output=False)[1]
  assert untied['gpt/output']['w'].shape == (10, 13)


def test_an_untrained_model_is_as_good_as_chance():
  model, params = _model()
  tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, 13)
  logits = model.apply(params, None, tokens[:, :-1])
  total, count = cross_entropy(logits, tokens[:, 1:])
  assert abs(total / count - np.log(13)) < 0.05


def test_cross_entropy_counts_nats_where_the_mask_is_true(assert_close):
  probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
  logits = jnp.log(probabilities) + 3
  total, count = cross_entropy(logits, jnp.array([0, 1]))
  assert_close(total, np.float32(-np.log(0.5) - np.log(0.8)))
  assert count == 2
  total, count = cross_entropy(
    logits, jnp.array([1, 0]), jnp.array([True, False])
  )
  assert_close(total, np.float32(-np.log(0.25)))
  assert count == 1


def test_cross_entropy_has_no_scatter_in_its_gradient():
  # That would be an array of float32 in the logits' size, which XLA keeps.
  logits, targets = jnp.zeros((5, 7, 13), jnp.bfloat16), jnp.zeros((5, 7), int)
  gradient = jax.grad(lambda logits: cross_entropy(logits, targets)[0])
  assert 'scatter' not in str(jax.make_jaxpr(gradient)(logits))
  assert gradient(logits).dtype == jnp.bfloat16


def _step(model, params):
  def step(tokens, cache):
    logits, cache = model.apply(params, None, tokens, cache=cache)
    return logits[:, -1], cache

  return step


def _last_logits(model, params, tokens):
  """The last token's logits; padding, masked by causality, keeps one shape."""
  padded = np.pad(tokens, ((0, 0), (0, 11 - tokens.shape[1])))
  return model.apply(params, None, padded)[:, tokens.shape[1] - 1]


def test_tokens_in_pieces_give_the_logits_of_the_whole(assert_close):
  model, params = _model()
  params = jax.tree.map(lambda p: p * 5, params)
  tokens = np.random.default_rng(0).integers(0, 13, (2, 11))
  expected = model.apply(params, None, tokens)
  cache, at = Cache.create(11), 0
  for size in (4, 1, 5, 1):
    piece = tokens[:, at : at + size]
    logits, cache = model.apply(params, None, piece, cache=cache)
    assert_close(logits, expected[:, at : at + size])
    at += size


def test_window_step_gives_the_plain_forward_pass(assert_close):
  model, params = _model()
  step, cache = window_step(
    lambda p, t: model.apply(p, None, t), params, context_size=11
  )
  tokens = np.random.default_rng(0).integers(0, 13, (2, 17))
  logits, cache = step(tokens[:, :4], cache)
  assert_close(logits, _last_logits(model, params, tokens[:, :4]))
  for i in range(4, 17):
    logits, cache = step(tokens[:, i : i + 1], cache)
    window = tokens[:, max(0, i - 10) : i + 1]
    assert_close(logits, _last_logits(model, params, window), scale=5)


def test_prompts_of_different_lengths_go_on_as_alone():
  model, params = _model()
  params = jax.tree.map(lambda p: p * 20, params)
  prompts = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]
  tokens, start = align(prompts)

  @jax.jit
  def write(cache, tokens):
    return decoding.greedy(_step(model, params), cache, tokens, 6)

  together = write(Cache.create(11, start), tokens)
  for row, prompt in zip(together, prompts, strict=True):
    alone = write(Cache.create(11), np.array([prompt]))[0]
    np.testing.assert_array_equal(row, alone)


def test_the_likeliest_tokens_are_those_of_a_loop():
  model, params = _model()
  params = jax.tree.map(lambda p: p * 20, params)
  tokens = np.array([[1, 2, 3]])
  step = _step(model, params)
  drawn = decoding.greedy(step, Cache.create(9), tokens, 6)
  for _ in range(6):
    likeliest = np.argmax(_last_logits(model, params, tokens), -1)
    tokens = np.append(tokens, likeliest[:, None], axis=1)
  np.testing.assert_array_equal(drawn, tokens[:, 3:])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      dict(num_heads=3),
      'num_heads: expected a divisor of model_size=10, got 3',
    ),
    (dict(num_layers=0), 'num_layers: expected 1 or more, got 0'),
    (dict(num_heads=0), 'num_heads: expected 1 or more, got 0'),
    (dict(num_layer=3), "model.num_layer: .* did you mean 'num_layers'"),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _model(**fields)


def test_more_tokens_than_positions_are_refused():
  model, params = _model()
  with pytest.raises(ValueError, match='at most context_size=11 .* got 12'):
    model.apply(params, None, np.zeros((1, 12), int))
  with pytest.raises(ValueError, match='at most context_size=11 .* got 12'):
    model.apply(params, None, np.zeros((1, 2), int), cache=Cache.create(12))


def test_an_unknown_model_is_refused():
  with pytest.raises(
    ValueError, match=r"model: expected one of .*'gpt'.*'gtp'"
  ):
    models.create('gtp')
