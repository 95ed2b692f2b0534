"""Tests of reading, encoding and batching sentence pairs."""

import datetime
import gzip

import numpy as np
import pytest

from attention.data import dates, tones, translation
from attention.data.subwords import Subwords
from attention.data.vocabularies import END, NUM_SPECIAL, START, Bytes, Framed

_TEXTS = ['ein Haus', 'zwei kleine Häuser, am Fluß', 'drei', 'ein Boot'] * 9


def _pairs(count=53):
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, 30, (count, 2))
  return [
    [rng.integers(3, 20, n).astype(np.int32) for n in lengths[:, side]]
    for side in (0, 1)
  ]


def _buckets(**options):
  options = dict(batch_tokens=500, num_buckets=3, seed=7) | options
  return translation.Buckets.of(*_pairs(), **options)


def _learn(size):
  return Framed(
    Subwords.learn(_TEXTS, size, num_special=NUM_SPECIAL, add_prefix_space=True)
  )


@pytest.mark.parametrize('vocabulary', [Framed(Bytes()), _learn(290)])
def test_decoding_inverts_encoding(vocabulary):
  for text in [*_TEXTS[:4], 'naïve 🙂 </s> <pad>', 'x']:
    (tokens,) = vocabulary.encode([text])
    assert tokens.dtype == np.int32
    assert tokens.min() >= 3 and tokens.max() < vocabulary.size
    assert vocabulary.decode(tokens) == text
    ended = [START, *tokens, END, 7, 8]
    assert vocabulary.decode(ended) == text
    assert len(vocabulary.pieces(ended)) == len(tokens)


def test_bpe_is_deterministic():
  one, two = (_learn(300) for _ in range(2))
  assert one == two
  assert one.size <= 300
  whole, parts = (v.encode(['ein Haus'])[0] for v in (one, Framed(Bytes())))
  assert len(whole) < len(parts) / 2
  with pytest.raises(ValueError, match='vocab_size: expected 259 or more'):
    _learn(200)


def test_buckets_need_less_padding_than_one():
  sources, targets = _pairs()

  def size(buckets):
    return sum(
      len(numbers) * sum(shape)
      for numbers, shape in zip(buckets.members, buckets.shapes, strict=True)
    )

  few, many = _buckets(num_buckets=1), _buckets(num_buckets=5)
  assert size(many) < 0.75 * size(few)
  assert len(many.shapes) <= 5
  assert sorted(np.concatenate(many.members)) == list(range(len(sources)))
  for numbers, (k, t) in zip(many.members, many.shapes, strict=True):
    assert max(len(sources[i]) for i in numbers) == k
    assert max(len(targets[i]) + 1 for i in numbers) == t


def test_bucket_limits_are_optimal():
  lengths = np.array([2, 2, 3, 7, 7, 8, 8, 8, 13, 21])
  limits = translation._limits(lengths, 3)

  def cost(limits):
    return sum(min(x for x in limits if x >= n) for n in lengths)

  values = sorted({*lengths.tolist()})
  best = min(
    cost([a, b, 21]) for a in values for b in values if a <= b
  )  # fmt: skip
  assert cost(limits) == best


def test_epochs_have_every_pair_in_different_orders():
  buckets = _buckets()
  sources, targets = _pairs()

  def epoch(n):
    seen = []
    for step in range(n * buckets.num_batches, (n + 1) * buckets.num_batches):
      batch = buckets.batch(step)
      for source, length, inputs, outputs, mask in zip(
        *(batch[k] for k in ('source', 'lengths', 'inputs', 'targets', 'mask')),
        strict=True,
      ):
        count = mask.sum()
        assert outputs[count - 1] == END and not outputs[count:].any()
        assert inputs[0] == START
        np.testing.assert_array_equal(inputs[1:count], outputs[: count - 1])
        assert not source[length:].any()
        seen.append((*source[:length], -1, *outputs[: count - 1]))
    return seen

  all_pairs = {(*s, -1, *t) for s, t in zip(sources, targets, strict=True)}
  first, second = epoch(0), epoch(1)
  assert set(first) == set(second) == all_pairs
  assert first != second


def test_batches_depend_only_on_seed_and_step():
  one, two, other = _buckets(), _buckets(), _buckets(seed=8)
  two.batch(0)
  for name, part in one.batch(23).items():
    np.testing.assert_array_equal(part, two.batch(23)[name])
  steps = range(one.num_batches)
  assert any(
    one.batch(n)['source'].tolist() != other.batch(n)['source'].tolist()
    for n in steps
  )
  assert {len(one.batch(n)['source']) % 8 for n in steps} == {0}


def test_all_yields_each_pair_once():
  buckets = _buckets()
  numbers = []
  for part, batch in buckets.all():
    numbers += part.tolist()
    assert not batch['mask'][len(part) :].any()
    for i, row in zip(part, batch['targets'], strict=False):
      expected = [*buckets.targets[i], END]
      np.testing.assert_array_equal(row[: len(expected)], expected)
  assert sorted(numbers) == list(range(53))


@pytest.mark.parametrize('part', ['train', 'validation', 'unseen'])
def test_dates_contain_the_iso_day_and_year(part):
  found = dates.pairs(part, 300)
  for text, iso in found:
    day = datetime.date.fromisoformat(iso)
    assert 1950 <= day.year <= 2049
    assert str(day.year) in text and str(day.day) in text
  assert len({text for text, _ in found}) > 290


def test_held_out_days_are_not_in_training():
  days = {part: {d for _, d in dates.pairs(part, 4000)} for part in
          ('train', 'validation', 'unseen')}  # fmt: skip
  assert not days['train'] & (days['validation'] | days['unseen'])


def test_dates_are_unambiguous():
  found = {}
  for part in ('train', 'validation', 'unseen'):
    for text, iso in dates.pairs(part, 4000):
      assert found.setdefault(text, iso) == iso


def test_spectra_identify_the_tones():
  spectra, digits = tones.pairs('train', 5)
  assert spectra[0].shape[1] == tones.FRAME_SIZE
  assert spectra[0].dtype == np.float32
  hertz = (18 + np.arange(tones.FRAME_SIZE)) * 8000 / 256
  for spectrum, number in zip(spectra, digits, strict=True):
    loud = spectrum[spectrum.max(1) > 2.5]
    # The loudest channels within a tone are near the key's two frequencies.
    found_keys = set()
    for frame in loud:
      low = hertz[np.argmax(np.where(hertz < 1075, frame, 0))]
      high = hertz[np.argmax(np.where(hertz > 1075, frame, 0))]
      row = np.argmin(np.abs(np.array([697, 770, 852, 941]) - low))
      column = np.argmin(np.abs(np.array([1209, 1336, 1477]) - high))
      found_keys.add('123456789*0#'[row * 3 + column])
    assert set(number) <= found_keys
  assert tones.pairs('validation', 5)[1] != digits


@pytest.fixture
def files(tmp_path):
  for name, lines in (('a', 'one\ntwo\n'), ('b', 'eins\nzwei'), ('c', 'x\n')):
    (tmp_path / name).write_text(lines)
  (tmp_path / 'a.gz').write_bytes(gzip.compress(b'one\r\ntwo\n'))
  (tmp_path / 'cut.gz').write_bytes(gzip.compress(b'one\ntwo\n')[:-9])
  (tmp_path / 'latin').write_bytes(b'ein\nFl\xfc\xdfe\n')
  (tmp_path / 'empty').write_text('')
  return lambda name: str(tmp_path / name) if name else ''


def test_lines_are_read_plain_or_gzipped(files):
  expected = ['one', 'two'], ['eins', 'zwei']
  assert translation.read_pairs(files('a'), files('b')) == expected
  assert translation.read_pairs(files('a.gz'), files('b')) == expected


@pytest.mark.parametrize(
  ('source', 'target', 'message'),
  [
    ('a', 'c', 'c: expected 2 lines to match .*a, got 1'),
    ('a', 'latin', 'latin: line 2: not UTF-8 at byte 2 .0xfc.'),
    ('empty', 'empty', 'empty: the file is empty'),
    ('cut.gz', 'b', 'cut.gz: damaged gzip file'),
    ('a', '', 'expected two aligned files'),
  ],
)
def test_mismatched_files_raise(files, source, target, message):
  with pytest.raises(ValueError, match=message):
    translation.read_pairs(files(source), files(target))


def test_too_long_pairs_and_invalid_options_raise(files):
  def load(**more):
    return translation.Translations.load(
      path=files('a'),
      target_path=files('b'),
      validation_path=files('a'),
      validation_target_path=files('b'),
      **more,
    )

  assert load().num_left_out == 0
  with pytest.raises(ValueError, match='at least one pair .*max_length=3'):
    load(max_length=3)
  with pytest.raises(ValueError, match="level: expected 'bytes' or 'bpe'"):
    load(level='words')
  with pytest.raises(ValueError, match='embedded: expected one of'):
    translation.Translations.load(embedded='songs')
