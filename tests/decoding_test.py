import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding

V = 7
_OPTIONS = (
  'temperature',
  'top_k',
  'top_p',
  'min_p',
  'repetition_penalty',
)


def _step(tokens, cache):
  """A model that favours last token + 1; its cache counts tokens."""
  logits = 3.0 * jax.nn.one_hot((tokens[:, -1] + 1) % V, V)
  return logits, cache + tokens.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 2), static_argnames=_OPTIONS)
def _sample(num_tokens, seed, prompt, **options):
  return decoding.sample(
    _step,
    jnp.int32(0),
    jnp.asarray(prompt, jnp.int32).reshape(len(prompt), -1),
    num_tokens,
    jax.random.key(seed),
    **options,
  )


def _draw(num_tokens=400, seed=0, prompt=((1, 2), (4, 5)), **options):
  return _sample(num_tokens, seed, prompt, **options)


@pytest.mark.parametrize('options', [{'temperature': 0.0}, {'top_k': 1}])
def test_top_one_and_temperature_zero_are_greedy(options):
  expected = (np.array([[3], [6]]) + np.arange(400)) % V
  np.testing.assert_array_equal(_draw(**options), expected)


def _counts(drawn):
  steps = np.diff(np.asarray(drawn), axis=1) % V
  return np.bincount(steps.ravel(), minlength=V) / steps.size


def test_samples_follow_the_distribution():
  likely = np.exp(3) / (np.exp(3) + V - 1)
  assert abs(_counts(_draw(2000))[1] - likely) < 0.02
  flat = np.exp(1.5) / (np.exp(1.5) + V - 1)
  assert abs(_counts(_draw(2000, temperature=2.0))[1] - flat) < 0.03


def test_top_k_keeps_ties():
  # The six other tokens are equally likely, and ties are kept.
  assert (_counts(_draw(2000, top_k=V)) > 0.03).all()
  assert (_counts(_draw(2000, top_k=V + 5)) > 0.03).all()


def test_single_token_has_the_right_shape():
  assert _draw(1).shape == (2, 1)


def test_samples_are_reproducible_and_depend_on_the_seed():
  np.testing.assert_array_equal(_draw(seed=3), _draw(seed=3))
  assert (_draw(seed=3) != _draw(seed=4)).any()


def test_top_p_samples_from_the_nucleus():
  likely = np.exp(3) / (np.exp(3) + V - 1)  # about 0.77, the others 0.04
  only = _counts(_draw(500, top_p=likely - 0.01))
  assert only[1] == 1
  assert (_counts(_draw(2000, top_p=0.9999)) > 0.02).all()


def test_min_p_excludes_unlikely_tokens():
  ratio = np.exp(-3)
  assert _counts(_draw(500, min_p=ratio * 1.1))[1] == 1
  assert (_counts(_draw(2000, min_p=ratio * 0.9)) > 0.02).all()


def test_sampling_options_compose():
  """A high temperature flattens the logits before each filter applies."""
  drawn = _draw(3000, temperature=50.0, top_k=V, top_p=0.999, min_p=0.95)
  counts = _counts(drawn)
  # The others have e^(-3/50) = 0.94 of the top probability, below 0.95.
  assert counts[1] == 1
  counts = _counts(_draw(3000, temperature=50.0, min_p=0.9))
  assert (counts > 0.08).all()


def test_repetition_penalty_reduces_repetition():
  def flat(tokens, cache):
    return jnp.zeros((len(tokens), V)).at[:, 2].set(1.0), cache

  def decode(**options):
    drawn = decoding.sample(
      flat, 0, jnp.array([[5], [6]]), 4, jax.random.key(0), **options
    )
    return np.asarray(drawn)

  options = dict(temperature=0.0)
  assert (decode(**options) == 2).all()
  # Positive logits are divided, so 2 stays the likeliest; -1 becomes -4.
  assert (decode(repetition_penalty=4.0, **options) == 2).all()

  def below(tokens, cache):
    return jnp.full((len(tokens), V), -1.1).at[:, 2].set(-1.0), cache

  drawn = decoding.sample(
    below,
    0,
    jnp.array([[0], [2]]),
    V - 1,
    jax.random.key(0),
    repetition_penalty=4.0,
    **options,
  )
  # Each other token appears once; 2 comes first unless the prompt has it.
  np.testing.assert_array_equal(drawn, [[2, 1, 3, 4, 5, 6], [0, 1, 3, 4, 5, 6]])


def test_decoding_with_64_bit_types():
  def decode():
    prompt, cache = jnp.array([[1], [4]]), jnp.int32(0)
    return [
      decoding.greedy(_step, cache, prompt, 5, end=6),
      _draw(5, top_p=0.9, repetition_penalty=2.0),
      decoding.beam_search(_step, cache, prompt, 5, end=6)[0],
    ]

  expected = decode()
  with jax.enable_x64(True):
    actual = decode()
  np.testing.assert_array_equal(actual[0], expected[0])
  assert [x.dtype for x in actual] == ['int32'] * 3
  assert [x.shape for x in actual] == [x.shape for x in expected]


def test_ended_rows_stay_padded_and_the_loop_stops_early():
  prompt = jnp.array([[1], [4]])
  tokens = decoding.greedy(_step, jnp.int32(0), prompt, 30, end=6)
  np.testing.assert_array_equal(
    tokens[:, :6], [[2, 3, 4, 5, 6, 6], [5, *[6] * 5]]
  )
  assert (tokens == 6)[:, 6:].all()
  drawn = decoding.sample(
    _step, jnp.int32(0), prompt, 50, jax.random.key(0), end=6
  )
  for row in np.asarray(drawn):
    assert (row[np.argmax(row == 6) :] == 6).all()

  calls = []

  def counted_step(tokens, cache):
    jax.debug.callback(lambda _: calls.append(1), tokens)
    return _step(tokens, cache)

  decoding.greedy(counted_step, jnp.int32(0), prompt, 30, end=6)
  jax.effects_barrier()
  assert len(calls) == 5  # the prompt and four tokens; the last is not fed back


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
  ('prompt', 'message'),
  [
    ([1, 2], r'expected \[b, t\], got shape \(2,\)'),
    ([[1.0, 2.0]], 'expected ints, got float32'),
    ([[]], 'expected at least one token'),
  ],
)
def test_invalid_prompts_raise(prompt, message):
  for decode in (
    lambda: decoding.greedy(_step, jnp.int32(0), prompt, 3),
    lambda: _search(np.asarray(prompt)),
  ):
    with pytest.raises(ValueError, match=f'prompt: {message}'):
      decode()


def test_prompt_may_be_a_list():
  tokens = decoding.greedy(_step, jnp.int32(0), [[1], [4]], 2)
  np.testing.assert_array_equal(tokens, [[2, 3], [5, 6]])


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


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': -1.0}, 'temperature: expected 0 or more, got -1'),
    ({'top_k': 0}, 'top_k: expected 1 or more, got 0'),
    ({'top_p': 0.0}, 'top_p: expected above 0, up to 1, got 0.0'),
    ({'min_p': 1.5}, 'min_p: expected 0 to 1, got 1.5'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty: .* above 0, got 0'),
    ({'prompt': ((), ())}, 'prompt: expected at least one token'),
  ],
)
def test_invalid_sampling_options_raise(options, message):
  with pytest.raises(ValueError, match=message):
    _draw(**options)
