"""Tests of reading, splitting, batching and validating classification data."""

import numpy as np
import pytest

from attention.data import classification

pytest.importorskip('sklearn')


def _digits(**fields):
  return classification.load('digits', **{'batch_size': 7, **fields})


def _text(path, **fields):
  fields = {'batch_size': 3, 'context_size': 5, **fields}
  return classification.load('text', path=str(path), **fields)


def _write(root, files):
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return root


def test_digits_are_split_into_patches_with_a_fifth_held_out():
  data = _digits(patch_size=3, stride=2, is_shifted=False, batch_size=1438)
  assert (len(data.train), len(data.held_out)) == (1438, 359)
  assert data.labels == tuple('0123456789')
  whole = _digits(patch_size=8, is_shifted=False)
  image = whole.held_out.inputs[5].reshape(8, 8)
  expected = [
    image[y : y + 3, x : x + 3].ravel() for y in (0, 2, 4) for x in (0, 2, 4)
  ]
  np.testing.assert_array_equal(data.held_out.inputs[5], expected)
  # One epoch has each training image once.
  first, other = data.batch(0), data.held_out
  images = {x.tobytes() for x in first['inputs']}
  assert len(images) == 1438
  assert not images & {x.tobytes() for x in other.inputs}


def test_training_digits_are_shifted_by_up_to_a_pixel():
  moved, still = _digits(patch_size=8), _digits(patch_size=8, is_shifted=False)
  seen = set()
  for step in range(6):
    for a, b in zip(
      moved.batch(step)['inputs'], still.batch(step)['inputs'], strict=True
    ):
      padded = np.pad(b.reshape(8, 8), 1)
      a = a.reshape(8, 8)
      seen |= {
        (y, x)
        for y in range(3)
        for x in range(3)
        if (a == padded[y : y + 8, x : x + 8]).all()
      }
  assert len(seen) == 9
  np.testing.assert_array_equal(moved.held_out.inputs, still.held_out.inputs)


def test_batches_depend_only_on_seed_and_step():
  one, same, other = _digits(seed=1), _digits(seed=1), _digits(seed=2)
  same.batch(0)
  np.testing.assert_array_equal(one.batch(5)['inputs'], same.batch(5)['inputs'])
  assert (one.batch(5)['targets'] != other.batch(5)['targets']).any()
  assert one.batch(5)['inputs'].shape == (7, 25, 16)


def test_held_out_batches_have_each_example_once():
  data = _digits()
  batches = list(data.held_out_batches(100))
  assert {b['inputs'].shape for b in batches} == {(100, 25, 16)}
  targets = np.concatenate([b['targets'][b['is_real']] for b in batches])
  np.testing.assert_array_equal(targets, data.held_out.targets)


def test_folders_and_tables_are_equivalent(tmp_path):
  texts = [(f'good word{i} Fine.', 'good') for i in range(10)]
  texts += [(f'bad word{i}\nPoor!\u2028', 'bad') for i in range(10, 20)]
  folder = _write(
    tmp_path / 'folder',
    {f'{label}/{i:02d}.txt': text for i, (text, label) in enumerate(texts)},
  )
  rows = sorted(texts, key=lambda x: x[1])
  table = tmp_path / 'table.csv'
  # With a byte order mark, as spreadsheets write it.
  table.write_text(
    '\ufeffkind,id,body\n'
    + ''.join(f'{label},{i},"{t}"\n' for i, (t, label) in enumerate(rows))
  )
  one = _text(folder)
  two = _text(table, text_column='body', label_column='kind')
  assert one.sha256 == two.sha256
  assert one.labels == ('bad', 'good')
  assert (len(one.train), len(one.held_out)) == (16, 4)
  for a, b in ((one.train, two.train), (one.held_out, two.held_out)):
    for name in ('inputs', 'lengths', 'targets'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
  # Lower-case words and punctuation, padded; held-out words are unknown.
  example = one.train[0]
  words = one.vocabulary.decode(example['inputs'])
  kind = one.labels[example['targets']]
  assert words[0] == kind and words[1].startswith('word')
  assert words[2:4] == {'good': ['fine', '.'], 'bad': ['poor', '!']}[kind]
  assert (example['lengths'], words[4]) == (4, '')
  held = one.vocabulary.decode(one.held_out.inputs[0])
  assert held[1] == '�'


def test_test_folder_is_held_out(tmp_path):
  root = _write(
    tmp_path,
    {
      'train/a/1': 'x y',
      'train/b/1': 'z',
      'test/a/1': 'y',
      'test/b/sub/1': 'x x x x x x x',
    },
  )
  data = _text(root, level='bytes')
  assert (len(data.train), len(data.held_out)) == (2, 2)
  held = data.held_out
  np.testing.assert_array_equal(held.lengths, [1, 5])
  assert ''.join(data.vocabulary.decode(held.inputs[1])) == 'x x x'


def test_vocabulary_has_the_most_frequent_words(tmp_path):
  root = _write(
    tmp_path, {f'{x}/{i}': 'b b c c c a' for x in 'xyz' for i in range(4)}
  )
  words = classification.Words.of(['b b c c c a a d'], 5)
  assert words.words == ('c', 'a', 'b')
  assert words.size == 5
  assert words.encode('A d').tolist() == [3, classification.UNKNOWN]
  assert _text(root, vocab_size=3).vocabulary.words == ('c',)


def test_default_texts_are_from_the_standard_library():
  data = classification.load('text', batch_size=4, context_size=16)
  assert 'email' in data.labels
  assert min(np.bincount(data.train.targets)) > 10
  # The package's own name is removed from its passages.
  label = data.labels.index('email')
  rows = data.train.inputs[data.train.targets == label]
  assert not any('email' in data.vocabulary.decode(row) for row in rows)


def test_invalid_data_and_options_raise(tmp_path):
  one = _write(tmp_path / 'one', {'a/1': 'x', 'a/2': 'y'})
  empty = _write(tmp_path / 'empty', {'a/1': 'x', 'b/2': ''})
  unknown = _write(
    tmp_path / 'unknown', {'train/a/1': 'x', 'train/b/1': 'x', 'test/c/1': 'x'}
  )
  _write(tmp_path / 'unknown', {'test/a/1': 'x'})
  table = _write(tmp_path, {'t.csv': 'text,kind\nx,a\ny,a\n'}) / 't.csv'
  short = _write(tmp_path, {'short.csv': 'text,label\nx,a\ny\n'}) / 'short.csv'
  for call, message in (
    (lambda: _text(one), r"for each of two or more classes, got \['a'\]"),
    (lambda: _text(empty), '2: the file is empty'),
    (lambda: _text(unknown), "class 'c' is in test but not in train"),
    (
      lambda: _text(table),
      r"label_column: expected one of \['text', 'kind'\], .* got 'label'",
    ),
    (
      lambda: _text(table, label_column='kind'),
      r"more classes, got \['a'\]",
    ),
    (lambda: _text(short), 'row 2 has too few columns'),
    (lambda: _text(one, level='letters'), "data.level: .* got 'letters'"),
    (lambda: _text(one, context_size=0), 'data.context_size: expected 1'),
    (lambda: _text(one, batch_size=0), 'data.batch_size: expected 1'),
    (lambda: _digits(patch_size=9), 'data.patch_size: expected 1 to 8'),
    (lambda: _digits(path='x'), "data.path: expected ''"),
    (lambda: classification.load('sound'), 'data.kind: expected one of'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(OSError, match='nowhere'):
    _text(tmp_path / 'nowhere')
