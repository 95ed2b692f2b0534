"""Sampling text from a GPT, piece by piece."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.data.subwords import Subwords
from attention.data.vocabularies import Bytes, Characters
from attention.training.tasks import generation
from attention.training.tasks.language import Language

_CONTEXT = 16  # gives pieces of 4 tokens


def _task(vocabulary, **sizes):
  sizes = (
    dict(num_layers=1, num_heads=2, model_size=12, context_size=_CONTEXT)
    | sizes
  )
  return Language(vocabulary, sizes, None)


@functools.cache
def _greedy_task(size=1, **sizes):
  """A task with random parameters whose texts do not repeat themselves."""
  task = _task(Characters('abcdefghijk'), **sizes)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.default_rng(size)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )
  return task, params, jax.jit(task.apply)


def _plainly(task, params, apply, prompt, num_tokens):
  """Sample greedily by forward passes over what fits before each piece."""
  tokens = task.vocabulary.encode(prompt).tolist()
  for _ in range(-(-num_tokens // 4)):
    window = tokens[-(_CONTEXT - 3) :]
    for _ in range(4):
      rest = [0] * (_CONTEXT - len(window))  # padding, masked by causality
      logits = apply(params, np.array([window + rest]))
      window = [*window, int(logits[0, len(window) - 1].argmax())]
    tokens += window[-4:]
  return task.vocabulary.decode(tokens[: len(prompt) + num_tokens])


_KINDS = {
  'plain': {},
  'window': dict(positions='rotary', window=3, num_layers=2),
  'lstm': dict(mixer='lstm'),
}


@pytest.mark.parametrize('kind', _KINDS)
def test_a_stream_matches_plain_forward_passes(kind, monkeypatch):
  monkeypatch.setattr(generation, '_CHUNK', 4)
  monkeypatch.setattr(generation, '_SHORT', 2)
  task, params, apply = _greedy_task(**_KINDS[kind])
  for length in (1, 7, 40):
    prompt = ('abcdefghijk' * 4)[:length]
    pieces = list(task.stream(params, prompt, 10, seed=0, temperature=0.0))
    assert [len(p) for p in pieces] == [length, 4, 4, 2]
    expected = _plainly(task, params, apply, prompt, 10)
    assert ''.join(pieces) == expected


def test_a_text_within_the_context_is_read_once(monkeypatch):
  task, params, _ = _greedy_task()
  reads, read = [], generation.Generator.read
  monkeypatch.setattr(
    generation.Generator, 'read', lambda *x: reads.append(x) or read(*x)
  )
  task.sample(params, 'abcd', 12, seed=0)  # a text of the context size
  assert len(reads) == 1
  task.sample(params, 'abcd', 20, seed=0)
  assert len(reads) == 1 + 3


@pytest.mark.parametrize('kind', _KINDS)
def test_prompts_in_a_batch_go_on_as_alone(kind):
  task, params, _ = _greedy_task(**_KINDS[kind])
  prompts = ['abc', 'd', 'kjihgfedcb', 'hagfea']
  together = task.continue_batch(params, prompts, 9, seed=0, temperature=0.0)
  for prompt, text in zip(prompts, together, strict=True):
    alone = task.sample(params, prompt, 9, seed=0, temperature=0.0)
    assert prompt + text == alone


def test_a_repetition_penalty_counts_all_pieces(monkeypatch):
  texts = set()
  for size in (16, 4):
    monkeypatch.setattr(generation, 'PIECE', size)
    task, params, _ = _greedy_task(context_size=64)
    options = dict(seed=0, temperature=0.0)
    plain = task.sample(params, 'a', 16, **options)
    texts |= {task.sample(params, 'a', 16, repetition_penalty=3.0, **options)}
  (text,) = texts
  assert len(set(text)) > len(set(plain))


@pytest.mark.parametrize('num_tokens', [6, 20])
def test_a_draft_does_not_change_a_greedy_text(num_tokens):
  task, params, _ = _greedy_task(context_size=40)
  small, its_params, _ = _greedy_task(2, context_size=40, positions='rotary')
  options = dict(seed=0, temperature=0.0)
  expected = task.sample(params, 'abc', num_tokens, **options)
  for draft in (
    small.as_draft(its_params, 2),
    task.as_draft(params, 2),
  ):
    text = task.sample(params, 'abc', num_tokens, draft=draft, **options)
    assert text == expected
  assert len(draft.accepted) == -(-num_tokens // 10)
  assert np.mean(draft.accepted) == 2
  prompts = ['abc', 'fedacb']
  assert task.continue_batch(
    params, prompts, num_tokens, draft=draft, **options
  ) == task.continue_batch(params, prompts, num_tokens, **options)


def test_drafts_that_do_not_fit_are_refused():
  task, params, _ = _greedy_task()
  others = _task(Characters('abc')), _greedy_task(mixer='lstm')[0]
  for other, message, more in (
    (others[0], 'draft: .* of 11 tokens, got another, of 3', {}),
    (others[1], "draft: expected mixer='attention' in both", {}),
    (task, 'repetition_penalty: .* draft, got 2', {'repetition_penalty': 2.0}),
  ):
    draft = other.as_draft(params)
    with pytest.raises(ValueError, match=message):
      task.sample(params, 'a', 4, seed=0, draft=draft, **more)


def _scripted(monkeypatch, text, vocabulary=None, **attributes):
  """The stream of a model that writes a text, 4 tokens at a time."""
  vocabulary = vocabulary or Bytes()
  task = _task(vocabulary)
  for name, value in attributes.items():
    setattr(task, name, value)
  tokens = vocabulary.encode(text)
  pieces = np.pad(tokens, (0, -len(tokens) % 4)).reshape(-1, 1, 4)
  monkeypatch.setattr(task._generator, 'pieces', lambda *_, **__: iter(pieces))
  return lambda **options: list(
    task.stream(None, 'ß', len(tokens), seed=0, **options)
  )


def test_text_ends_before_a_stop_that_straddles_pieces(monkeypatch):
  stream = _scripted(monkeypatch, 'one END two EN three')
  assert stream() == ['ß', 'one ', 'END ', 'two ', 'EN t', 'hree']
  assert stream(stop=('o E',)) == ['ß', 'one ', 'END ', 'tw']
  # 'EN' may be the beginning of a stop until a space follows.
  assert stream(stop=('ENDE',)) == ['ß', 'one ', 'END ', 'two ', 'EN t', 'hree']
  assert stream(stop=(' EN ',)) == ['ß', 'one', ' END', ' two']
  assert stream(stop=('EN t', 'wo E')) == ['ß', 'one ', 'END ', 't']
  assert stream(stop=('one', 'e')) == ['ß']
  assert stream(stop=('reed',)) == ['ß', 'one ', 'END ', 'two ', 'EN t', 'hree']
  with pytest.raises(ValueError, match="stop: expected at least one .* got ''"):
    stream(stop=('',))


def test_text_ends_before_an_end_token(monkeypatch):
  stream = _scripted(monkeypatch, 'one two three', end=ord('w'))
  assert stream() == ['ß', 'one ', 't']
  stream = _scripted(monkeypatch, 'one two three', end=(ord('n'), ord('w')))
  assert stream() == ['ß', 'o']


def test_sampling_stops_at_the_end_token():
  task, params, _ = _greedy_task()
  whole = task.sample(params, 'abc', 12, seed=0, temperature=0.0)[3:]
  task = _task(Characters('abcdefghijk'))
  task.end = 'abcdefghijk'.index(whole[6])
  first = whole.index(whole[6])
  prompts = ['abc', 'fed']
  assert (
    task.sample(params, 'abc', 12, seed=0, temperature=0.0)
    == 'abc' + whole[:first]
  )
  texts = task.continue_batch(params, prompts, 12, seed=0, temperature=0.0)
  assert texts[0] == whole[:first]


@pytest.mark.parametrize('vocabulary', [Bytes(), Subwords.learn([], 256)])
def test_multibyte_symbols_are_streamed_whole(monkeypatch, vocabulary):
  stream = _scripted(monkeypatch, 'aé€ü𝄞zéa', vocabulary)
  assert stream() == ['ß', 'aé', '€ü', '𝄞', 'zéa']


def test_only_tokens_of_the_vocabulary_are_sampled():
  task = _task(Characters('abc'), vocab_size=50)
  params = jax.jit(task.init)(jax.random.key(0))
  text = task.sample(params, 'a', 40, seed=0, temperature=5.0)
  assert len(text) == 41 and set(text) == set('abc')
