"""Beam search against all sequences, and greedy decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding

# log P(next | last), chosen so that greedy decoding from 0 is suboptimal.
_CHAIN = np.log(
  np.array(
    [
      # end   1     2     3     4
      [1e-9, 0.6, 0.4, 1e-9, 1e-9],
      [0.25, 0.25, 0.2, 0.15, 0.15],
      [0.05, 1e-9, 0.05, 0.9, 1e-9],
      [0.9, 0.05, 0.03, 0.01, 0.01],
      [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
  )
)


def _markov(tokens, cache):
  """A Markov chain whose cache holds all tokens so far."""
  seen, length = cache
  seen = jax.lax.dynamic_update_slice(seen, tokens, (0, length))
  return jnp.asarray(_CHAIN, jnp.float32)[tokens[:, -1]], (
    seen,
    length + tokens.shape[1],
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    'num_tokens',
    'step',
    'beam_size',
    'num_best',
    'length_penalty',
  ),
)
def _search(prompt, num_tokens=6, step=_markov, **options):
  cache = jnp.zeros((len(prompt), 9), jnp.int32), jnp.int32(0)
  return decoding.beam_search(step, cache, prompt, num_tokens, end=0, **options)


def _all_sequences(first, num_tokens, alpha):
  """All complete sequences with their scores, best first."""
  found = []

  def extend(tokens, score):
    for token in range(5):
      new = score + _CHAIN[tokens[-1], token]
      written = [*tokens[1:], token]
      if token == 0:
        length = len(written)
        found.append((new / ((5 + length) / 6) ** alpha, written))
      elif len(written) < num_tokens:
        extend([*tokens, token], new)

  extend([first], 0.0)
  return sorted(found, reverse=True)


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
def test_wide_beam_finds_the_best_sequence(alpha, assert_close):
  tokens, scores = _search(
    np.array([[0], [2]]),
    num_tokens=4,
    beam_size=5,
    num_best=2,
    length_penalty=alpha,
  )
  for row, first in enumerate((0, 2)):
    best = _all_sequences(first, 4, alpha)[0]
    got = np.asarray(tokens[row, 0]).tolist()
    assert got[: len(best[1])] == best[1]
    assert_close(scores[row, 0], np.float32(best[0]))
  assert (scores[:, 0] >= scores[:, 1]).all()


def test_one_beam_is_greedy():
  prompt = jnp.array([[0], [1], [2], [4]])
  cache = jnp.zeros((4, 9), jnp.int32), jnp.int32(0)
  expected = decoding.greedy(_markov, cache, prompt, 6, end=0)
  for alpha in (0.0, 2.0):
    tokens, _ = _search(prompt, beam_size=1, length_penalty=alpha)
    np.testing.assert_array_equal(tokens[:, 0], expected)


def test_beams_carry_their_caches():
  """The logits depend on all previous tokens, not only on the last one."""

  @jax.jit
  def step(tokens, cache):
    seen, length = cache
    seen = jax.lax.dynamic_update_slice(seen, tokens, (0, length))
    mixed = (seen * jnp.arange(1, 10)).sum(-1) * 37 % 101
    logits = jnp.sin(mixed[:, None] * jnp.arange(1.0, 6.0)) * 2
    return logits, (seen, length + tokens.shape[1])

  prompt = jnp.array([[3], [1]])
  tokens, scores = _search(
    prompt, num_tokens=5, step=step, beam_size=4, num_best=4, length_penalty=0.0
  )
  for row in range(2):
    for n in range(4):
      cache = jnp.zeros((1, 9), jnp.int32), jnp.int32(0)
      last, total = prompt[row : row + 1], 0.0
      for token in np.asarray(tokens[row, n]):
        logits, cache = step(last, cache)
        total += float(jax.nn.log_softmax(logits)[0, token])
        last = jnp.full((1, 1), token)
        if token == 0:
          break
      assert abs(total - float(scores[row, n])) < 1e-4


def test_rows_are_searched_independently():
  together, _ = _search(np.array([[0], [4], [2]]), beam_size=3, num_best=3)
  for row, first in enumerate((0, 4, 2)):
    alone, _ = _search(np.array([[first]]), beam_size=3, num_best=3)
    np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'beam_size': 6}, 'beam_size: expected 1 to 5, .*vocabulary size, got 6'),
    ({'beam_size': 0}, 'beam_size: expected 1 to 5'),
    (
      {'beam_size': 2, 'num_best': 3},
      'num_best: expected 1 to beam_size=2, got 3',
    ),
    ({'num_tokens': 0}, 'num_tokens: expected 1 or more, got 0'),
  ],
)
def test_invalid_beam_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    _search(np.array([[0]]), **options)


def test_a_beam_needs_an_end():
  cache = jnp.zeros((1, 9), jnp.int32), jnp.int32(0)
  with pytest.raises(ValueError, match='end: expected one token or more'):
    decoding.beam_search(_markov, cache, np.array([[0]]), 6, end=())


def test_any_of_several_tokens_ends_a_hypothesis():
  """With a wide beam, the best of all sequences that end in 0 or 3."""

  @jax.jit
  def search(prompt):
    cache = jnp.zeros((1, 9), jnp.int32), jnp.int32(0)
    return decoding.beam_search(
      _markov, cache, prompt, 3, end=(0, 3), beam_size=5, length_penalty=0.0
    )

  tokens, scores = search(np.array([[0]]))
  # 0 → 2 → 3 has probability 0.4 · 0.9.
  np.testing.assert_array_equal(tokens[0, 0], [2, 3, 0])
  assert abs(float(scores[0, 0]) - np.log(0.36)) < 1e-5
