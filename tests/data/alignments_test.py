"""Alignment files, sequence weights and batches."""

import gzip

import numpy as np
import pytest

from attention.data import alignments
from attention.data.alignments import Rows, letters, read, sequence_weights

A3M = """# comment
>query a family
MKVL
AE
>one
MK-LttaAE
>two
.MRV.L-E
"""
FASTA = """>query
MK-VLAE
>one
MKTv-AE
"""
STOCKHOLM = """# STOCKHOLM 1.0
#=GF ID family

query  MKV.
one    MRVA
#=GC SS_cons HHHH

query  LAE
one    -AE
//
"""


def _write(folder, name, text):
  path = folder / name
  content = text if isinstance(text, bytes) else text.encode()
  if name.endswith('.gz') and isinstance(text, str):
    content = gzip.compress(content)
  path.write_bytes(content)
  return str(path)


@pytest.mark.parametrize(
  ('name', 'text', 'rows'),
  [
    ('x.a3m', A3M, ['MKVLAE', 'MK-LAE', 'MRVL-E']),
    ('x.a3m.gz', A3M, ['MKVLAE', 'MK-LAE', 'MRVL-E']),
    ('x.A3M', A3M.replace('\n', '\r\n'), ['MKVLAE', 'MK-LAE', 'MRVL-E']),
    # The third column is a gap of the query.
    ('x.fasta', FASTA, ['MKVLAE', 'MKV-AE']),
    ('x.sto', STOCKHOLM, ['MKVLAE', 'MRV-AE']),
  ],
  ids=['a3m', 'gzip', 'windows', 'fasta', 'stockholm'],
)
def test_files_are_read_in_the_columns_of_the_query(tmp_path, name, text, rows):
  alignment = read(_write(tmp_path, name, text))
  assert [letters(row) for row in alignment.residues] == rows
  assert alignment.query == rows[0]
  assert alignment.residues.dtype == np.int8


def test_rare_residues_are_read_like_common_ones(tmp_path):
  found = read(_write(tmp_path, 'x.a3m', '>q\nBZUOJ\n>o\n-----\n'))
  assert letters(found.residues[0]) == 'DECXX'


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('x.a3m', '>q\nMKV\n>o\nMKVL\n', "line 3: sequence 'o' fills 4 .* 3 as in"),
    ('x.a3m', '>q\nMKV\n', 'expected an alignment of 2 or more .* got 1'),
    ('x.a3m', '', 'expected an alignment of 2 or more sequences, got 0'),
    ('x.a3m', '>q\nMKV\n>o\nM1V\n', "line 3: .* has '1' in column 2"),
    ('x.fa', 'MKV\n>o\nMKV\n', "line 1: expected '>' and a name before"),
    ('x.a3m', '>q\nMKV\n>o\n>p\nMKV\n', "line 3: sequence 'o' fills 0 columns"),
    ('x.fa', '>q\n---\n>o\nMKV\n', 'the first sequence has no residues'),
    ('x.sto', '# STOCKHOLM 1.0\nq MKV x\n', 'line 2: expected a name and a'),
    ('x.a3m', b'>q\nM\xffV\n', 'line 2: not UTF-8 at byte 1'),
    ('x.a3m.gz', b'\x1f\x8bno', 'damaged gzip file'),
    ('x.phy', '2 3', r"expected an alignment .* \.a3m, .* got '\.phy'"),
  ],
)
def test_damaged_files_are_reported_by_line(tmp_path, name, text, message):
  with pytest.raises(ValueError, match=message):
    read(_write(tmp_path, name, text))


def test_weights_count_copies_once():
  rng = np.random.default_rng(0)
  distinct = rng.integers(0, 20, (3, 100))
  near, far = distinct[0].copy(), distinct[0].copy()
  near[:20], far[:21] = 21, 21  # 80% and 79% of the columns agree
  weights = sequence_weights(np.stack([*distinct, distinct[1], near, far]))
  # `near` and `far` are alike, too.
  np.testing.assert_allclose(weights, [1 / 2, 1 / 2, 1, 1 / 2, 1 / 3, 1 / 2])


def _family(**changes):
  fields = dict(length=40, num_sequences=30, batch_size=500, seed=3)
  return Rows.load(**{**fields, **changes})


def test_batches_depend_on_seed_and_step_only():
  family = _family()
  for step in (0, 7):
    again = _family().batch(step)['residues']
    np.testing.assert_array_equal(family.batch(step)['residues'], again)
  first = family.batch(0)['residues']
  assert (first != family.batch(1)['residues']).any()
  assert (first != _family(seed=4).batch(0)['residues']).any()


def test_rows_are_drawn_in_proportion_to_their_weights():
  rows = np.eye(10, dtype=np.int8)
  rows = np.concatenate([rows[:1]] * 8 + [rows[:1] + 5])
  family = Rows(alignments.Alignment('', rows), 4_000, 0)
  drawn = family.batch(0)['residues'][:, 0]
  # Eight copies weigh as much as the other sequence.
  assert abs((drawn == 1).mean() - 0.5) < 0.05


def test_a_generated_family_has_known_contacts():
  alignment = _family().alignment
  assert alignment.residues.shape == (30, 40)
  assert alignment.contacts.shape == (40, 40)
  assert 1 <= alignment.effective_number <= 30


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(length=10), 'data.length: expected 30 or more, got 10'),
    (dict(num_sequences=1), 'data.num_sequences: expected 2 or more, got 1'),
    (dict(batch_size=0), 'data.batch_size: expected 1 or more, got 0'),
  ],
)
def test_sizes_out_of_range_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _family(**changes)
