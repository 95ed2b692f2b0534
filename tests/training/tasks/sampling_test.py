"""Sampling text from a GPT, piece by piece."""

import jax
import numpy as np
import pytest

from attention.data.subwords import Subwords
from attention.data.vocabularies import Bytes, Characters
from attention.training.tasks.language import Language

_CONTEXT = 16  # gives pieces of 4 tokens


def _task(vocabulary, **sizes):
  sizes = dict(num_layers=1, num_heads=2, model_size=12) | sizes
  return Language(vocabulary, {'context_size': _CONTEXT, **sizes}, None)


@pytest.mark.parametrize('length', [1, 7, 40])
def test_a_stream_matches_plain_forward_passes(length):
  task = _task(Characters('abcdefghijk'))
  params = jax.jit(task.init)(jax.random.key(0))
  params = jax.tree.map(lambda p: 5 * p, params)
  prompt = ('abcdefghijk' * 4)[:length]
  pieces = list(task.stream(params, prompt, 10, seed=0, temperature=0.0))
  assert [len(p) for p in pieces] == [length, 4, 4, 2]
  tokens = task.vocabulary.encode(prompt).tolist()
  apply = jax.jit(task.apply)
  for _ in range(3):
    window = tokens[-(_CONTEXT - 3) :]  # what fits before a piece
    for _ in range(4):
      rest = [0] * (_CONTEXT - len(window))  # padding, masked by causality
      logits = apply(params, np.array([window + rest]))
      window = [*window, int(logits[0, len(window) - 1].argmax())]
    tokens += window[-4:]
  assert ''.join(pieces) == task.vocabulary.decode(tokens[: length + 10])


@pytest.mark.parametrize('vocabulary', [Bytes(), Subwords.learn([], 256)])
def test_multibyte_symbols_are_streamed_whole(monkeypatch, vocabulary):
  task = _task(vocabulary)
  tokens = vocabulary.encode('aé€ü𝄞zéa')
  pieces = iter(tokens.reshape(-1, 1, 4))
  monkeypatch.setattr(task, '_sample', lambda *_, **__: next(pieces))
  text = list(task.stream(None, 'ß', len(tokens), seed=0))
  assert text == ['ß', 'aé', '€ü', '𝄞', 'zéa']


def test_only_tokens_of_the_vocabulary_are_sampled():
  task = _task(Characters('abc'), vocab_size=50)
  params = jax.jit(task.init)(jax.random.key(0))
  text = task.sample(params, 'a', 40, seed=0, temperature=5.0)
  assert len(text) == 41 and set(text) == set('abc')
