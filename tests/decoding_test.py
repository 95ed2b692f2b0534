import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding

V = 7


def _step(tokens, cache):
  """A model that likes the number after the last one; it counts its tokens."""
  logits = 3.0 * jax.nn.one_hot((tokens[:, -1] + 1) % V, V)
  return logits, cache + tokens.shape[1]


def _draw(num_tokens=400, seed=0, prompt=((1, 2), (4, 5)), **options):
  return decoding.sample(
    _step,
    jnp.int32(0),
    jnp.asarray(prompt, jnp.int32).reshape(len(prompt), -1),
    num_tokens,
    jax.random.key(seed),
    **options,
  )


@pytest.mark.parametrize('options', [{'temperature': 0.0}, {'top_k': 1}])
def test_top_one_and_temperature_zero_take_the_likeliest(options):
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


def test_top_k_draws_among_k_at_each_step():
  # The six others are equally likely: a tie stays in.
  assert (_counts(_draw(2000, top_k=V)) > 0.03).all()
  assert (_counts(_draw(2000, top_k=V + 5)) > 0.03).all()


def test_one_token_is_one_token():
  assert _draw(1).shape == (2, 1)


def test_seeds_differ_and_repeat():
  np.testing.assert_array_equal(_draw(seed=3), _draw(seed=3))
  assert (_draw(seed=3) != _draw(seed=4)).any()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'temperature': -1.0}, 'temperature: expected 0 or more, got -1'),
    ({'top_k': 0}, 'top_k: expected 1 or more, got 0'),
    ({'prompt': ((), ())}, 'prompt: expected at least one token'),
  ],
)
def test_senseless_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    _draw(**options)
