"""Greedy decoding and sampling with small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding
from attention.decoding import filters

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


def _step_at_all(tokens, cache):
  """The same at all positions, for speculative decoding."""
  return 3.0 * jax.nn.one_hot((tokens + 1) % V, V), cache + tokens.shape[1]


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


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_samples_of_half_precision_logits_follow_the_distribution(dtype):
  drawn = decoding.sample(
    lambda tokens, cache: (jnp.zeros((len(tokens), 1000), dtype), cache),
    jnp.int32(0),
    jnp.zeros((10_000, 1), jnp.int32),
    1,
    jax.random.key(0),
  )
  first, last = (drawn[:, -1] < 100).mean(), (drawn[:, -1] >= 900).mean()
  assert abs(first - 0.1) < 0.02 and abs(last - 0.1) < 0.02


def test_top_p_of_one_keeps_all_tokens():
  logits = 4 * jax.random.normal(jax.random.key(0), (6, 50_257))
  options = dict(temperature=1.0, top_k=None, top_p=1.0, min_p=None)
  assert jnp.isfinite(filters.narrow(logits, **options)).all()


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
      decoding.speculative(
        _step_at_all,
        cache,
        _step_at_all,
        cache,
        prompt,
        5,
        temperature=0.0,
        end=6,
        rewind=lambda cache, count: cache - count,
      )[0],
    ]

  expected = decode()
  with jax.enable_x64(True):
    actual = decode()
  np.testing.assert_array_equal(actual[0], expected[0])
  assert [x.dtype for x in actual] == ['int32'] * 4
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
    lambda: decoding.beam_search(_step, jnp.int32(0), prompt, 3, end=0),
    lambda: decoding.prefill(_step, jnp.int32(0), prompt),
  ):
    with pytest.raises(ValueError, match=f'prompt: {message}'):
      decode()


def test_prompt_may_be_a_list():
  tokens = decoding.greedy(_step, jnp.int32(0), [[1], [4]], 2)
  np.testing.assert_array_equal(tokens, [[2, 3], [5, 6]])


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


def test_a_prompt_is_read_in_chunks():
  def step(tokens, cache):
    """The logits depend on all tokens so far."""
    sizes.append(tokens.shape[1])
    for column in tokens.T:
      cache = cache * 3 + column
    return jnp.sin(cache[:, None] * jnp.arange(1.0, V + 1)), cache

  prompt = np.random.default_rng(0).integers(0, V, (2, 9))
  cache = jnp.zeros(2, jnp.int32)
  for chunk_size, expected in (
    (None, [9]),
    (9, [9]),
    (20, [9]),
    (4, [1, 4]),
    (3, [3, 3]),
    (1, [1, 1]),
  ):
    sizes = []
    logits, after = decoding.prefill(step, cache, prompt, chunk_size)
    assert sizes == expected
    if chunk_size is None:
      whole = logits, after
    np.testing.assert_array_equal(after, whole[1])
    np.testing.assert_array_equal(logits, whole[0])
  with pytest.raises(ValueError, match='chunk_size: expected 1 or more, got 0'):
    decoding.prefill(step, cache, prompt, 0)
  drawn = [
    decoding.greedy(step, cache, prompt, 4, chunk_size=n) for n in (None, 4)
  ]
  np.testing.assert_array_equal(*drawn)


def test_a_cache_goes_on_with_the_last_token():
  prompt = jnp.array([[1], [4]])
  tokens, cache = decoding.greedy(
    _step, jnp.int32(0), prompt, 5, with_cache=True
  )
  assert cache == 5  # the prompt and all tokens but the last
  more, cache = decoding.sample(
    _step,
    cache,
    tokens[:, -1:],
    3,
    jax.random.key(0),
    temperature=0.0,
    with_cache=True,
  )
  assert cache == 8
  np.testing.assert_array_equal(
    np.concatenate([tokens, more], axis=1),
    decoding.greedy(_step, jnp.int32(0), prompt, 8),
  )


def test_a_penalty_goes_on_with_the_tokens_seen():
  def flat(tokens, cache):
    return -1.0 - 0.01 * jnp.ones((len(tokens), 1)) * jnp.arange(V), cache

  options = dict(temperature=0.0, repetition_penalty=4.0)
  rng, prompt = jax.random.key(0), jnp.array([[0]])
  whole = decoding.sample(flat, 0, prompt, 5, rng, **options)
  first = decoding.sample(flat, 0, prompt, 2, rng, **options)
  seen = jnp.zeros((1, V), bool).at[0, jnp.array([0, *first[0]])].set(True)
  more = decoding.sample(flat, 0, first[:, -1:], 3, rng, seen=seen, **options)
  np.testing.assert_array_equal([[*first[0], *more[0]]], whole)
  np.testing.assert_array_equal(whole, [[1, 2, 3, 4, 5]])


def test_any_of_several_tokens_ends_a_row():
  prompt = jnp.array([[1], [4]])
  tokens = decoding.greedy(_step, jnp.int32(0), prompt, 9, end=(6, 3))
  # The first of them fills the row.
  np.testing.assert_array_equal(tokens, [[2, 3, *[6] * 7], [5, *[6] * 8]])
