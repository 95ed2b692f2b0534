import hashlib

import numpy as np
import pytest

from attention.data import language
from attention.data.subwords import Subwords
from attention.data.vocabularies import Bytes, Characters


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(''.join(chr(97 + i * i % 23) for i in range(1000)))
  return path


def _load(path, **fields):
  return language.Text.load(
    **(dict(path=str(path), context_size=7, batch_size=5) | fields)
  )


@pytest.mark.parametrize('vocabulary', [Characters.of('héello\n🙂'), Bytes()])
def test_decoding_undoes_encoding(vocabulary):
  tokens = vocabulary.encode('🙂hello\né')
  assert tokens.dtype == np.int32
  assert tokens.max() < vocabulary.size
  assert vocabulary.decode(tokens) == '🙂hello\né'
  assert len(vocabulary.pieces(tokens)) == len(tokens)


def test_unknown_symbols_raise():
  vocabulary = Characters.of('abc')
  for text in ('abcd', 'aé', 'A'):
    message = "symbols '[dAé]' are not in the vocabulary of 3"
    with pytest.raises(ValueError, match=message):
      vocabulary.encode(text)


def test_last_tenth_is_for_validation(path):
  data = _load(path)
  text = path.read_text()
  assert data.vocabulary.decode(data.train) == text[:900]
  assert data.vocabulary.decode(data.validation) == text[900:]
  assert data.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_batches_depend_only_on_seed_and_step(path):
  one, two = _load(path), _load(path)
  late = one.batch(700)
  for n in (0, 1, 2):
    one.batch(n)
  np.testing.assert_array_equal(one.batch(700)['tokens'], late['tokens'])
  np.testing.assert_array_equal(two.batch(700)['tokens'], late['tokens'])
  other = _load(path, seed=1).batch(700)
  assert (other['tokens'] != late['tokens']).any()


def test_targets_are_the_next_tokens(path):
  data = _load(path)
  starts = set()
  for n in range(200):
    batch = data.batch(n)
    assert batch['tokens'].shape == batch['targets'].shape == (5, 7)
    assert (batch['tokens'][:, 1:] == batch['targets'][:, :-1]).all()
    starts |= {row.tobytes() for row in batch['tokens']}
  # An epoch has each of the 893 windows once; some windows are equal.
  windows = [data.train[i : i + 7].tobytes() for i in range(893)]
  assert starts == set(windows)


def test_validation_has_each_target_once(path):
  data = _load(path)
  seen = []
  for batch in data.validation_batches(3):
    assert batch['tokens'].shape == (3, 7)
    seen.extend(batch['targets'][batch['mask']])
  np.testing.assert_array_equal(seen, data.validation[1:])


def test_default_text_is_the_standard_library():
  data = _load('')
  assert data.name == "the Python standard library's own source"
  assert len(data.tokens) > 1_000_000
  assert data.vocabulary.symbols.isascii()


def test_bytes_encode_any_text(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('naïve 🙂 ' * 50)
  data = _load(path, level='bytes')
  assert data.vocabulary.size == 256
  assert bytes(data.tokens.astype(np.uint8)).decode() == path.read_text()


def test_subwords_are_learnt_from_the_training_part(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('the fox ' * 900 + 'zebras 🙂 ' * 80)
  data = _load(path, level='bpe', vocab_size=270)
  assert data.vocabulary.decode(data.tokens) == path.read_text()
  assert data.vocabulary.encode(' fox').size == 1
  assert data.vocabulary.encode(' zebras').size > 3
  assert len(data.train) == len(data.tokens) * 9 // 10
  assert data.tokens.max() < data.vocabulary.size <= 270
  text = data.vocabulary.decode(data.validation[1:])
  assert data.validation_bytes == len(text.encode())


def test_recorded_vocabulary_is_reused(path, monkeypatch):
  fields = dict(level='bpe', vocab_size=258)
  data = _load(path, **fields)
  record = {'sha256': data.sha256, 'vocabulary': data.vocabulary.record}
  monkeypatch.setattr(Subwords, 'learn', None)
  again = _load(path, record=record, **fields)
  np.testing.assert_array_equal(again.tokens, data.tokens)
  with pytest.raises(TypeError):  # the record of another text
    _load(path, record=record | {'sha256': '0'}, **fields)


def test_invalid_files_and_options_raise(tmp_path):
  path = tmp_path / 'text.txt'
  with pytest.raises(FileNotFoundError):
    _load(path)
  path.write_bytes(b'')
  with pytest.raises(ValueError, match='text.txt: the file is empty'):
    _load(path)
  path.write_bytes(b'abc\xffdef')
  with pytest.raises(ValueError, match=r'not UTF-8 at byte 3 \(0xff\)'):
    _load(path)
  path.write_text('abcdefgh')
  with pytest.raises(ValueError, match='8 tokens are too few for context_size'):
    _load(path)
  with pytest.raises(ValueError, match='data.level: expected one of'):
    _load(path, level='words')
  with pytest.raises(ValueError, match='data.batch_size: expected 1 or more'):
    _load(path, batch_size=0)
