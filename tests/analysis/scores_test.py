"""Tests of scores of attention patterns, against loops and known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import analysis

B, H, T = 2, 3, 9
OF_TOKENS = ('induction', 'duplicate_token')
OF_PATTERNS = ('previous_token', 'first_token', 'entropy')


@pytest.fixture
def pattern():
  """Random causal patterns [B, H, T, T] and tokens [B, T] that repeat."""
  rng = np.random.default_rng(0)
  weights = np.tril(rng.uniform(size=(B, H, T, T)))
  tokens = rng.integers(3, size=(B, T))
  return weights / weights.sum(-1, keepdims=True), tokens


def _loop(function, *arrays):
  """function(pattern [t, t], tokens [t]) of each row and head, as [B, H, …]."""
  pattern, tokens = arrays
  return np.array(
    [[function(pattern[b, h], tokens[b]) for h in range(H)] for b in range(B)]
  )


def _previous_token(pattern, tokens):
  return np.mean([pattern[q, q - 1] for q in range(1, T)])


def _first_token(pattern, tokens):
  return np.mean([pattern[q, 0] for q in range(1, T)])


def _induction(pattern, tokens):
  found = []
  for q in range(T):
    keys = [k for k in range(1, q + 1) if tokens[k - 1] == tokens[q]]
    if keys:
      found.append(sum(pattern[q, k] for k in keys))
  return np.mean(found)


def _duplicate_token(pattern, tokens):
  found = []
  for q in range(T):
    keys = [k for k in range(q) if tokens[k] == tokens[q]]
    if keys:
      found.append(sum(pattern[q, k] for k in keys))
  return np.mean(found)


def _entropy(pattern, tokens):
  return [-sum(p * np.log(p) for p in row if p > 0) for row in pattern]


LOOPS = {
  'previous_token': _previous_token,
  'first_token': _first_token,
  'induction': _induction,
  'duplicate_token': _duplicate_token,
  'entropy': _entropy,
}


def _arguments(name, pattern):
  return pattern if name in OF_TOKENS else pattern[:1]


@pytest.mark.parametrize('name', LOOPS)
def test_scores_are_those_of_a_loop(name, pattern, assert_close):
  function, expected = getattr(analysis, name), _loop(LOOPS[name], *pattern)
  arrays = _arguments(name, pattern)
  score = function(*arrays)
  assert score.dtype == jnp.float32
  assert_close(score, expected)
  assert_close(jax.jit(function)(*map(jnp.asarray, arrays)), expected)
  assert_close(jax.vmap(function)(*map(jnp.asarray, arrays)), expected)


@pytest.mark.parametrize('name', LOOPS)
def test_scores_of_bfloat16_patterns_are_float32(name, pattern, assert_close):
  function, expected = getattr(analysis, name), _loop(LOOPS[name], *pattern)
  weights, *tokens = _arguments(name, pattern)
  score = function(jnp.asarray(weights, jnp.bfloat16), *tokens)
  assert score.dtype == jnp.float32
  assert_close(score, expected, dtype='bfloat16')


@pytest.mark.parametrize('name', OF_TOKENS)
def test_patterns_of_stacked_layers_share_tokens(name, pattern, assert_close):
  weights, tokens = pattern
  function = getattr(analysis, name)
  layers = np.stack([weights, weights[:, ::-1]])
  assert_close(
    function(layers, tokens),
    np.stack([function(weights, tokens), function(weights[:, ::-1], tokens)]),
  )
  assert function(weights[0], tokens[0]).shape == (H,)


# A B C A B C A: each token from the fourth on occurred three before.
REPEATED = np.array([0, 1, 2, 0, 1, 2, 0])


def _head(offset):
  """[1, t, t]: each query on the key that is `offset` before, or the first."""
  queries = np.arange(len(REPEATED))
  return np.eye(len(REPEATED))[np.maximum(queries - offset, 0)][None]


@pytest.mark.parametrize(
  'offset, scores',
  [
    # previous, first, induction, duplicate
    (1, (1, 1 / 6, 0, 0)),
    (2, (1 / 6, 2 / 6, 1, 0)),
    (3, (1 / 6, 3 / 6, 0, 1)),
    (5, (1 / 6, 5 / 6, 1 / 4, 1 / 4)),
    (7, (1 / 6, 1, 0, 2 / 4)),
  ],
)
def test_heads_of_one_key_have_known_scores(offset, scores):
  head = _head(offset)
  previous, first, induction, duplicate = scores
  close = dict(rtol=0, atol=1e-6)
  np.testing.assert_allclose(analysis.previous_token(head), [previous], **close)
  np.testing.assert_allclose(analysis.first_token(head), [first], **close)
  np.testing.assert_allclose(
    analysis.induction(head, REPEATED), [induction], **close
  )
  np.testing.assert_allclose(
    analysis.duplicate_token(head, REPEATED), [duplicate], **close
  )
  assert not analysis.entropy(head).any()


def test_rows_without_repeated_tokens_are_nan():
  head = np.stack([_head(2)] * 2)
  tokens = np.stack([np.arange(7), REPEATED])
  for name in OF_TOKENS:
    score = getattr(analysis, name)(head, tokens)
    assert np.isnan(score).tolist() == [[True], [False]]


def test_one_token_is_nan():
  for name in ('previous_token', 'first_token'):
    assert np.isnan(getattr(analysis, name)(np.ones((1, 1))))


def test_entropy_is_in_nats(assert_close):
  weights = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4, [0, 0, 0, 0]]
  expected = [0, np.log(2), np.log(4), 0]
  assert_close(analysis.entropy(np.array(weights)), np.float32(expected))


@pytest.mark.parametrize('residual', [0.5, 0.2, 0, 1.0])
def test_rollout_is_that_of_a_loop(residual, pattern, assert_close):
  layers = np.stack([pattern[0], pattern[0][:, ::-1], pattern[0] ** 2])
  layers[1, :, 0] = layers[1, :, 2]  # so that the order of layers matters
  expected = np.empty((B, T, T))
  for b in range(B):
    flow = np.eye(T)
    for layer in layers[:, b]:
      mean = sum(layer) / H
      flow = (residual * np.eye(T) + (1 - residual) * mean) @ flow
    expected[b] = flow
  flow = analysis.rollout(layers, residual=residual)
  assert flow.dtype == jnp.float32
  assert_close(flow, expected)
  jitted = jax.jit(lambda x: analysis.rollout(x, residual=residual))
  assert_close(jitted(jnp.asarray(layers)), expected)


def test_rollout_of_one_layer_is_half_the_residual(pattern, assert_close):
  weights = pattern[0]
  flow = analysis.rollout(weights[None])
  assert_close(flow, (np.eye(T) + weights.mean(1)) / 2)
  deep = analysis.rollout(np.stack([weights] * 4))
  assert_close(deep.sum(-1), np.ones((B, T)))


def test_previous_token_twice_reaches_two_back():
  # Layers in the order of the model: the last query reads 1, which read 0.
  to_0, to_1 = np.eye(3)[[0, 0, 2]], np.eye(3)[[0, 1, 1]]
  flow = analysis.rollout(np.stack([to_0, to_1])[:, None], residual=0.0)
  np.testing.assert_array_equal(flow[2], [1, 0, 0])


def test_shapes_that_do_not_match_are_refused(pattern):
  weights, tokens = pattern
  square = r'pattern: expected \[.*q, k\] with q = k, got shape '
  for function in (analysis.previous_token, analysis.first_token):
    for wrong in (weights[..., :-1, :], weights[0, 0, 0]):
      with pytest.raises(ValueError, match=square):
        function(wrong)
  for name in OF_TOKENS:
    function = getattr(analysis, name)
    for wrong in (weights[..., 1:], weights[0, 0]):
      with pytest.raises(ValueError, match=square):
        function(wrong, tokens)
    for wrong in (tokens[:, 1:], tokens[:1], tokens[None], tokens[0, 0]):
      with pytest.raises(ValueError, match=r'tokens: expected .* \(2, 9\)'):
        function(weights, wrong)
  square = r'patterns: expected \[layers, \*b, h, q, k\] with q = k, got shape '
  for wrong in (weights[None, ..., 1:], weights[0]):
    with pytest.raises(ValueError, match=square):
      analysis.rollout(wrong)
  with pytest.raises(ValueError, match='patterns: expected one layer'):
    analysis.rollout(weights[None][:0])
  for wrong in (-0.1, 1.5):
    with pytest.raises(ValueError, match='residual: expected 0 to 1, got'):
      analysis.rollout(weights[None], residual=wrong)
