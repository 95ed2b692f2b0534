"""Speculative decoding has the large model's distribution, exactly."""

import functools
import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import decoding, models
from attention.ops.cache import Cache, align

V = 3
_CHAINS = [
  np.random.default_rng(n).dirichlet(np.ones(V), (V, V)) for n in (0, 1)
]
_OPTIONS = dict(temperature=0.7, top_k=2, min_p=0.1)


def _chain(probabilities):
  """A model of memory two, whose cache is all tokens and their number."""

  def step(tokens, cache):
    seen, length = cache
    count = tokens.shape[1]
    seen = jax.lax.dynamic_update_slice_in_dim(seen, tokens, length, 1)
    before = jax.lax.dynamic_slice_in_dim(seen, length - 1, count, 1)
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    return logits[before, tokens], (seen, length + count)

  return step


def _rewind(cache, count):
  return cache[0], cache[1] - count


def _exact(first, num_tokens, options):
  """The probability of each continuation of the tokens (0, first)."""
  logits = np.log(_CHAINS[0]) / options.get('temperature', 1.0)
  if 'top_k' in options:
    least = np.sort(logits, -1)[..., -options['top_k'], None]
    logits = np.where(logits < least, -np.inf, logits)
  if 'min_p' in options:
    least = logits.max(-1, keepdims=True) + np.log(options['min_p'])
    logits = np.where(logits < least, -np.inf, logits)
  chain = np.exp(logits)
  chain /= chain.sum(-1, keepdims=True)
  found = []
  for tokens in itertools.product(range(V), repeat=num_tokens):
    path = [0, first, *tokens]
    triples = zip(path, path[1:], path[2:], strict=False)
    found.append(np.prod([chain[x] for x in triples]))
  return np.array(found)


@pytest.mark.parametrize('options', [{}, _OPTIONS], ids=['plain', 'filtered'])
@pytest.mark.parametrize('num_draft', [1, 3])
def test_tokens_have_the_large_models_distribution(num_draft, options):
  """All sequences of four tokens, in two rows that share their caches."""
  count, repeats = 4, 20_000
  prompt = jnp.array([[1], [2]])
  seen = jnp.zeros((2, 2 + count + num_draft), jnp.int32)
  cache = seen, jnp.int32(1)

  @jax.jit
  @jax.vmap
  def draw(rng):
    steps = [_chain(x) for x in _CHAINS]
    return decoding.speculative(
      steps[0],
      cache,
      steps[1],
      cache,
      prompt,
      count,
      rng,
      num_draft=num_draft,
      rewind=_rewind,
      **options,
    )

  tokens, accepted = draw(jax.random.split(jax.random.key(0), repeats))
  assert 0.1 < accepted.mean() < num_draft
  for row, first in enumerate((1, 2)):
    numbers = np.asarray(tokens[:, row]) @ V ** np.arange(count)[::-1]
    observed = np.bincount(numbers, minlength=V**count)
    expected = repeats * _exact(first, count, options)
    assert not observed[expected == 0].any()
    is_possible = expected > 0
    freedom = is_possible.sum() - 1
    deviations = (observed - expected)[is_possible] ** 2 / expected[is_possible]
    assert deviations.sum() < freedom + 5 * np.sqrt(2 * freedom)


_GPT = dict(num_layers=2, num_heads=2, model_size=8, vocab_size=11)


@functools.cache
def _gpt(seed, noise=0.0, context_size=40, **fields):
  """A random GPT's step; with noise, that of one that often agrees with it."""
  fields = _GPT | dict(context_size=context_size) | fields
  model = hk.without_apply_rng(
    hk.transform(
      lambda tokens, **more: models.create('gpt', **fields)(tokens, **more)
    )
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
  params = jax.tree.map(
    lambda x: jnp.asarray(x + noise * rng.normal(size=x.shape), 'f'), params
  )
  return lambda tokens, cache: model.apply(params, tokens, cache=cache)


def _greedy(step, cache, prompt, num_tokens, **options):
  def last(tokens, cache):
    logits, cache = step(tokens, cache)
    return logits[:, -1], cache

  return decoding.greedy(last, cache, prompt, num_tokens, **options)


_speculate = functools.partial(
  decoding.speculative, num_draft=3, temperature=0.0
)


def _fields(kind):
  return dict(
    plain={},
    window=dict(window=4, positions='rotary', with_tied_output=False),
    alibi=dict(window=6, positions='alibi', num_layers=1),
  )[kind]


@pytest.mark.parametrize('kind', ['plain', 'window', 'alibi'])
def test_greedy_tokens_are_the_large_models_own(kind):
  step, draft = (_gpt(0, noise, **_fields(kind)) for noise in (0.0, 0.05))
  tokens, start = align([[5, 1, 2, 9, 7, 3], [4, 4], [8, 10, 1]])
  size = 6 + 12 + 3 - 1

  @jax.jit
  def decode(tokens, start):
    cache = Cache.create(size, start, spare=3)
    return (
      _greedy(step, cache, tokens, 12),
      _speculate(step, cache, draft, cache, tokens, 12),
      _speculate(step, cache, draft, cache, tokens, 12, chunk_size=4),
    )

  expected, *actual = decode(tokens, start)
  for found, accepted in actual:
    np.testing.assert_array_equal(found, expected)
    assert 0.3 < accepted < 2.9


def test_a_draft_that_is_the_model_has_all_its_tokens_accepted():
  step = _gpt(0)
  cache, prompt = Cache.create(30), jnp.array([[1, 2], [3, 4]])
  for temperature in (0.0, 1.0):
    tokens, accepted = jax.jit(
      functools.partial(
        _speculate,
        step,
        cache,
        step,
        cache,
        num_tokens=13,
        temperature=temperature,
      )
    )(prompt=prompt, rng=jax.random.key(0))
    assert accepted == 3
    assert tokens.shape == (2, 13)


def test_rows_stop_at_any_end_token():
  step, draft = _gpt(0), _gpt(1)
  prompt = jnp.array([[1, 2], [3, 4], [5, 6]])

  @functools.partial(jax.jit, static_argnums=0)
  def decode(end):
    cache = Cache.create(30)
    return (
      _greedy(step, cache, prompt, 16, end=end),
      _speculate(step, cache, draft, cache, prompt, 16, end=end)[0],
    )

  free = np.asarray(decode(None)[0])
  ends = tuple({int(row[n]) for row, n in zip(free, (3, 0, 7), strict=True)})
  expected, actual = decode(ends)
  np.testing.assert_array_equal(actual, expected)
  assert (np.asarray(expected)[:, -1] == ends[0]).all()


@pytest.mark.parametrize('window', [None, 4])
def test_caches_go_on_with_the_last_token(window):
  step, draft = (_gpt(0, noise, window=window) for noise in (0.0, 0.05))
  prompt = jnp.array([[1, 2, 3]])
  cache = Cache.create(40, spare=3)
  expected = _greedy(step, cache, prompt, 20)
  go_on = jax.jit(
    functools.partial(
      _speculate, step, draft=draft, num_tokens=10, with_cache=True
    )
  )
  first, _, caches = go_on(cache=cache, draft_cache=cache, prompt=prompt)
  second, _, _ = go_on(
    cache=caches[0], draft_cache=caches[1], prompt=first[:, -1:]
  )
  found = np.concatenate([first, second], axis=1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(num_draft=0), 'num_draft: expected 1 or more, got 0'),
    (
      dict(temperature=1.0),
      'rng: expected a key for temperature=1.0',
    ),
    (
      dict(cache=Cache.create(11)),
      'cache: .* a capacity of 12, .*got 11',
    ),
    (dict(draft_cache=np.zeros(2)), 'draft_cache: .* a Cache .* only'),
    (
      dict(draft=_gpt(1, window=2)),
      'draft_cache: expected spare=3, num_draft, .* window, got 0',
    ),
    (
      dict(draft=_gpt(1, vocab_size=12)),
      'draft: expected a vocabulary of 11 like that of step, got 12',
    ),
    (dict(top_k=0), 'top_k: expected 1 or more, got 0'),
  ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
  arguments = dict(
    step=_gpt(0),
    cache=Cache.create(12),
    draft=_gpt(1),
    draft_cache=Cache.create(12),
    prompt=np.array([[1, 2, 3]]),
    num_tokens=7,
  )
  with pytest.raises(ValueError, match=message):
    _speculate(**arguments | changes)
