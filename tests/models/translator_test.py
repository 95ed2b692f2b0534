import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding, models
from attention.models.losses import token_cross_entropy
from attention.ops.cache import Cache

V, B, K, T, C = 13, 3, 7, 5, 4
_LENGTHS = np.array([7, 2, 5])
_START, _END = 1, 2


def _model(**fields):
  fields = dict(vocab_size=V, num_layers=2, num_heads=2, model_size=12) | fields
  model = hk.transform(
    lambda *inputs, **more: models.create('translator', **fields)(
      *inputs, **more
    )
  )
  model = hk.Transformed(model.init, jax.jit(model.apply))
  rng = np.random.default_rng(0)
  source = rng.integers(0, V, (B, K))
  if fields.get('source') == 'vectors':
    source = rng.normal(size=(B, K, C)).astype(np.float32)
  tokens = rng.integers(0, V, (B, T))
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), source, tokens, _LENGTHS
  )
  # NumPy's numbers, which need no compilation; large: logits that differ.
  params = jax.tree.map(
    lambda x: jnp.asarray(
      2 / np.sqrt(x.shape[0]) * rng.normal(size=x.shape), x.dtype
    ),
    shapes,
  )
  return model, params, source, tokens


@pytest.fixture(scope='module')
def plain():
  """The model of the default fields, whose programs tests share."""
  return _model()


_OPTIONS = [
  {},
  dict(norm='post', positions='learned', activation='gelu'),
  dict(source='vectors'),
  dict(with_shared_embeddings=False, with_tied_output=False),
  dict(attention={'num_kv_heads': 1, 'with_rotary': True}),
  dict(attention={'with_qk_norm': True, 'similarity': 'additive'}),
  dict(attention={'similarity': 'general', 'value_factorisation': 'full'}),
  dict(attention={'similarity': 'cosine', 'fused_qkv': True}),
]


@pytest.mark.parametrize('fields', _OPTIONS)
def test_cached_logits_are_those_of_the_whole(fields, assert_close):
  model, params, source, tokens = _model(**fields)
  expected = model.apply(params, None, source, tokens, _LENGTHS)
  assert expected.shape == (B, T, V)
  cache, at = Cache.create(T + 2), 0
  for size in (2, 1, 1, 1):
    piece = tokens[:, at : at + size]
    logits, cache = model.apply(
      params, None, source, piece, _LENGTHS, cache=cache
    )
    assert_close(logits, expected[:, at : at + size])
    at, source = at + size, None


def _step(model, params):
  def step(tokens, cache):
    source, lengths, layers = cache
    logits, layers = model.apply(
      params, None, source, tokens, lengths, cache=layers
    )
    return logits[:, -1], (None, lengths, layers)

  return step


def _start(source, capacity=8):
  prompt = np.full((len(source), 1), _START)
  return (source, _LENGTHS[: len(source)], Cache.create(capacity)), prompt


def test_refilling_a_padded_target_gives_the_same_tokens(plain):
  model, params, source, _ = plain

  @jax.jit
  def decode(params):
    cache, prompt = _start(source)
    return decoding.greedy(_step(model, params), cache, prompt, 7, end=_END)

  actual = decode(params)
  target = np.full((B, 8), 0)
  target[:, 0] = _START
  for i in range(7):
    logits = model.apply(params, None, source, target, _LENGTHS)
    token = np.argmax(logits[:, i], axis=-1)
    done = (target[:, 1 : i + 1] == _END).any(-1)
    target[:, i + 1] = np.where(done, _END, token)
  np.testing.assert_array_equal(actual, target[:, 1:])


def test_a_beams_score_is_the_sum_of_its_log_probabilities(plain, assert_close):
  model, params, source, _ = plain
  _, prompt = _start(source)

  @functools.partial(jax.jit, static_argnames='penalty')
  def search(params, penalty):
    cache, prompt = _start(source)
    return decoding.beam_search(
      _step(model, params),
      cache,
      prompt,
      7,
      end=_END,
      beam_size=4,
      num_best=3,
      length_penalty=penalty,
    )

  for penalty in (0.0, 0.8):
    tokens, scores = search(params, penalty)
    assert (np.diff(scores) <= 1e-6).all()
    for n in range(3):
      targets = np.asarray(tokens[:, n])
      inputs = np.concatenate([prompt, targets[:, :-1]], axis=1)
      logits = model.apply(params, None, source, inputs, _LENGTHS)
      nats = np.asarray(token_cross_entropy(logits, jnp.asarray(targets)))
      lengths = np.argmax(targets == _END, axis=1) + 1
      lengths = np.where((targets == _END).any(1), lengths, 7)
      sums = (nats * (np.arange(7) < lengths[:, None])).sum(1)
      assert_close(scores[:, n], -sums / ((5 + lengths) / 6) ** penalty)


def test_what_is_behind_a_sources_length_changes_nothing(plain, assert_close):
  model, params, source, tokens = plain
  expected = model.apply(params, None, source, tokens, _LENGTHS)
  changed = np.where(np.arange(K) < _LENGTHS[:, None], source, 9)
  assert_close(model.apply(params, None, changed, tokens, _LENGTHS), expected)


def test_no_logit_knows_later_targets(plain, assert_close):
  model, params, source, tokens = plain
  expected = model.apply(params, None, source, tokens, _LENGTHS)[:, :3]
  changed = np.where(np.arange(T) < 3, tokens, 9)
  actual = model.apply(params, None, source, changed, _LENGTHS)[:, :3]
  assert_close(actual, expected)


def test_one_table_or_two(plain):
  shared = plain[1]
  assert shared['translator/tokens']['embeddings'].shape == (V, 12)
  apart = _model(with_shared_embeddings=False)[1]
  assert {'translator/source_tokens', 'translator/target_tokens'} <= set(apart)


def test_label_smoothing_is_a_mixture_with_the_uniform(arrays, assert_close):
  (logits,) = arrays((B, T, V))
  targets = np.arange(B * T).reshape(B, T) % V
  log_probs = jax.nn.log_softmax(logits)
  wanted = 0.9 * jax.nn.one_hot(targets, V) + 0.1 / V
  assert_close(
    token_cross_entropy(logits, jnp.asarray(targets), 0.1),
    -(wanted * log_probs).sum(-1),
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(source='sound'), "source: expected one of .*, got 'sound'"),
    (dict(positions='sinus'), "positions: expected one of .*'sinusoidal'"),
    (dict(num_heads=5), 'num_heads: expected a divisor of model_size=12'),
    (
      dict(positions='learned', context_size=6),
      'source: expected at most context_size=6 positions, got 7',
    ),
  ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _model(**fields)


def test_a_source_of_another_kind_is_refused(plain):
  model, params, _, tokens = plain
  with pytest.raises(ValueError, match=r'source: expected tokens of rank 2'):
    model.apply(params, None, np.zeros((B, K, C)), tokens, _LENGTHS)
