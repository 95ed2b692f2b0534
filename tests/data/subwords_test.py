"""Tests of subwords: learnt and given tokenizers are lossless or raise."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.data.subwords import Subwords, cut

tokenizers = pytest.importorskip('tokenizers')

_TEXT = "It's 3 o'clock:\n\n  the naïve fox_7 says «hello»  🙂\r\n\tif x:\n" * 9
_LEARNT = Subwords.learn([_TEXT], 400)


def _gpt4_like():
  """A tokenizer like GPT-4's: own pattern, bytes, and a token with spaces."""
  pieces = tokenizers.pre_tokenizers
  pattern = tokenizers.Regex(r' ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\s|.')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = pieces.Sequence(
    [
      pieces.Split(pattern, 'isolated'),
      pieces.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=pieces.ByteLevel.alphabet(),
    special_tokens=['<the end>'],
    show_progress=False,
  )
  tokenizer.train_from_iterator([_TEXT], trainer)
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=99)
  return Subwords(tokenizer.to_str())


def _gpt2_like():
  """A tokenizer like GPT-2's file, with fewer fields and older merges."""
  record = json.loads(_LEARNT.json)
  for part in ('pre_tokenizer', 'decoder'):
    del record[part]['use_regex']
  model = record['model']
  model['merges'] = [' '.join(merge) for merge in model['merges']]
  model['unk_token'] = ''
  end = {'id': len(model['vocab']), 'content': '<|end|>', 'special': True}
  options = dict.fromkeys(('single_word', 'lstrip', 'rstrip'), False)
  record['added_tokens'] = [end | options | {'normalized': True}]
  return Subwords(json.dumps(record))


def _across_words():
  """A tokenizer without a word pattern, whose tokens may span spaces."""
  record = json.loads(_LEARNT.json)
  record['pre_tokenizer']['use_regex'] = False
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(record))
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([_TEXT], trainer)
  return Subwords(tokenizer.to_str())


# Arbitrary text, and text built from cases of the word patterns.
_ANY = st.text(max_size=200)
_WORDS = st.lists(
  st.sampled_from(
    [
      *" \n\t\r._'-1é🙂\x1c\x85\u2003",
      "it's",
      'fox',
      '<the end>',
      '<|end|>',
      '\u0301',
    ]
  ),
  max_size=40,
).map(''.join)


@pytest.mark.parametrize(
  'vocabulary',
  [_LEARNT, _gpt2_like(), _gpt4_like(), _across_words()],
  ids=['bpe', 'gpt2', 'gpt4', 'across'],
)
@settings(deadline=None, max_examples=100)
@given(text=st.one_of(_ANY, _WORDS))
def test_encoding_is_lossless_and_matches_the_whole_text(vocabulary, text):
  tokens = vocabulary.encode(text)
  assert tokens.dtype == np.int32
  assert vocabulary.decode(tokens) == text
  whole = tokenizers.Tokenizer.from_str(vocabulary.json)
  whole.no_truncation()
  whole.no_padding()
  assert tokens.tolist() == whole.encode(text, add_special_tokens=False).ids
  assert tokens.max(initial=0) < vocabulary.size
  assert len(vocabulary.pieces(tokens)) == len(tokens)


def test_learning_does_not_depend_on_splitting():
  assert ''.join(cut(_TEXT)) == _TEXT
  assert len(cut(_TEXT)) > 50
  assert Subwords.learn(cut(_TEXT), 400) == _LEARNT
  assert len(_LEARNT.encode(_TEXT)) < len(_TEXT) / 2


@pytest.mark.parametrize('vocabulary', [_LEARNT, _gpt2_like()])
def test_repeated_parts_are_encoded_once(monkeypatch, vocabulary):
  encode, seen = Subwords.encode_batch, []

  def count(self, texts):
    seen.extend(texts)
    return encode(self, texts)

  monkeypatch.setattr(Subwords, 'encode_batch', count)
  vocabulary.encode(_TEXT)
  assert sum(map(len, seen)) < len(_TEXT) / 4


def test_size_is_the_largest_id_plus_one():
  vocabulary = tokenizers.models.WordLevel({'a': 3, 'b': 7}, unk_token='a')
  assert Subwords(tokenizers.Tokenizer(vocabulary).to_str()).size == 8


def test_lossy_tokenizer_raises_with_position():
  tokenizer = tokenizers.Tokenizer.from_str(_LEARNT.json)
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  vocabulary = Subwords(tokenizer.to_str())
  assert vocabulary.encode('a fox').size
  with pytest.raises(ValueError, match="'Fox' at character 2 decodes to 'fox'"):
    vocabulary.encode('a Fox')
  with pytest.raises(ValueError, match='surrogates'):
    _LEARNT.encode('\ud800')


@pytest.mark.parametrize('content', ['', '{}', '[]', 'null'])
def test_invalid_tokenizers_raise(content):
  with pytest.raises(ValueError, match=r'not a tokenizer.json: '):
    Subwords(content).encode('a')


def test_too_small_vocabulary_sizes_raise():
  assert Subwords.learn([_TEXT], 256).size == 256
  for size, special, message in (
    (255, 0, 'expected 256 or more, got 255; it must hold 256 bytes$'),
    (258, 3, 'expected 259 or more, got 258; .* bytes and 3 special tokens'),
  ):
    with pytest.raises(ValueError, match=message):
      Subwords.learn([_TEXT], size, num_special=special)


def test_missing_tokenizers_package_raises(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  for use in (
    lambda: Subwords.learn([_TEXT], 300),
    lambda: Subwords(_LEARNT.json).encode('a'),
  ):
    with pytest.raises(ValueError, match=r"pip install -e '\.\[data\]'"):
      use()
