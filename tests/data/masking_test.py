"""Masked samples of alignments."""

import dataclasses

import numpy as np
import pytest

from attention.data import alignments, masking
from attention.data.alignments import Alignment
from attention.data.masking import MASK, Sampler
from attention.data.proteins import GAP

S, E, L = 5, 7, 11


def _alignment(size=40, length=31):
  rng = np.random.default_rng(0)
  residues = rng.integers(0, GAP + 1, (size, length)).astype(np.int8)
  residues[0] = rng.integers(0, 20, length)
  distances = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
  deletions = rng.integers(0, 3, residues.shape)
  return Alignment('x', residues, deletions, distances.astype('f'))


def _sample(alignment=None, seed=0, **fields):
  fields = {'num_seq': S, 'num_extra': E, 'num_res': L} | fields
  rng = np.random.default_rng(seed)
  return Sampler(**fields).sample(alignment or _alignment(), rng)


def test_samples_have_fixed_shapes():
  whole, padded = _sample(), _sample(_alignment(3, 6))
  for name, shape in {
    'query': (L,),
    'msa': (S, L),
    'targets': (S, L),
    'is_masked': (S, L),
    'msa_mask': (S, L),
    'extra_msa': (E, L),
    'extra_mask': (E, L),
    'res_mask': (L,),
    'deletions': (S, L),
    'extra_deletions': (E, L),
    'mean_deletions': (S, L),
    'profile': (S, L, masking.NUM_CLASSES),
    'residue_index': (L,),
    'distances': (L, L),
  }.items():
    assert whole.pop(name).shape == shape
    assert padded[name].shape == shape
  assert not whole
  assert padded['msa_mask'][:3, :6].all() and padded['msa_mask'].sum() == 18
  assert padded['res_mask'].sum() == 6
  assert not padded['extra_mask'].any() and not padded['is_masked'][3:].any()
  assert np.isnan(padded['distances'][6:]).all()


def test_rows_are_drawn_without_repetition_after_the_query():
  alignment = _alignment()
  sample = _sample(alignment, mask_rate=0.0, num_res=31, num_extra=35)
  np.testing.assert_array_equal(sample['query'], alignment.residues[0])
  rows = np.concatenate([sample['msa'], sample['extra_msa']])
  np.testing.assert_array_equal(rows[0], alignment.residues[0])
  assert sorted(map(tuple, rows)) == sorted(map(tuple, alignment.residues))
  assert (rows[1:] != alignment.residues[1:]).any()
  deleted = np.concatenate([sample['deletions'], sample['extra_deletions']])
  order = [
    int(np.flatnonzero((alignment.residues == row).all(1))[0]) for row in rows
  ]
  np.testing.assert_array_equal(deleted, alignment.deletions[order])


def test_crops_are_of_the_same_columns_everywhere():
  alignment = _alignment()
  starts = set()
  for seed in range(40):
    sample = _sample(alignment, seed)
    first = sample['residue_index'][0]
    columns = slice(first, first + L)
    np.testing.assert_array_equal(sample['residue_index'] - first, np.arange(L))
    np.testing.assert_array_equal(
      sample['query'], alignment.residues[0, columns]
    )
    np.testing.assert_array_equal(
      sample['distances'], alignment.distances[columns, columns]
    )
    starts.add(int(first))
  assert min(starts) == 0 and max(starts) == 31 - L


def test_masked_residues_are_replaced_in_alphafolds_proportions():
  # Each column has one residue only, which the profile then draws.
  residues = np.tile(np.arange(31) % 20, (4000, 1)).astype(np.int8)
  sample = _sample(
    Alignment('x', residues), num_seq=4000, num_extra=0, num_res=31
  )
  masked, msa, targets = (
    sample[name] for name in ('is_masked', 'msa', 'targets')
  )
  np.testing.assert_array_equal(msa[~masked], targets[~masked])
  assert masked.mean() == pytest.approx(0.15, abs=0.01)
  msa, targets = msa[masked], targets[masked]
  assert (msa == MASK).mean() == pytest.approx(0.7, abs=0.02)
  # 10% are kept, 10% drawn from the profile, 10% / 20 uniformly by chance.
  assert (msa == targets).mean() == pytest.approx(0.205, abs=0.02)
  others = msa[(msa != MASK) & (msa != targets)]
  assert set(others) == set(range(20))


def test_the_profile_replaces_residues_by_those_of_their_column():
  residues = np.full((3000, 31), 7, np.int8)
  residues[1::2] = GAP
  sample = _sample(
    Alignment('x', residues), num_seq=3000, num_extra=0, num_res=31
  )
  was_seven = sample['is_masked'] & (sample['targets'] == 7)
  share = (sample['msa'][was_seven] == GAP).mean()
  assert share == pytest.approx(0.05, abs=0.01)


def test_profiles_are_means_of_the_nearest_extra_rows():
  rows = np.array([[0] * 6, [1] * 6, [0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 2]])
  alignment = Alignment(
    'x', rows.astype(np.int8), deletions=np.arange(4)[:, None] + 0 * rows
  )
  # The order of the rows is random; look for one with rows 0 and 1 first.
  for seed in range(50):
    sample = _sample(
      alignment, seed, num_seq=2, num_extra=2, num_res=6, mask_rate=0.0
    )
    if (sample['msa'][1] == 1).all() and sample['extra_msa'][0, 0] == 0:
      break
  profile = sample['profile']
  np.testing.assert_allclose(profile.sum(-1), 1)
  np.testing.assert_array_equal(profile[0, 0, :2], [1, 0])
  np.testing.assert_array_equal(profile[0, 5, :2], [0.5, 0.5])
  np.testing.assert_array_equal(profile[1, 5, 1:3], [0.5, 0.5])
  np.testing.assert_array_equal(sample['mean_deletions'][:, 0], [1, 2])


def test_the_column_profile_does_not_count_masked_residues():
  sample = {
    'targets': np.array([[3, 3], [4, 3], [4, 5]]),
    'msa_mask': np.ones((3, 2), bool),
    'is_masked': np.array([[0, 1], [0, 1], [1, 0]], bool),
  }
  sample['targets'][2, 0] = 9
  np.testing.assert_array_equal(
    masking.column_profile(sample), [[3, 5], [3, 5], [3, 5]]
  )


def test_alignments_without_distances_or_deletions_can_be_sampled():
  alignment = dataclasses.replace(_alignment(), distances=None, deletions=None)
  sample = _sample(alignment)
  assert np.isnan(sample['distances']).all()
  assert not sample['deletions'].any() and not sample['mean_deletions'].any()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_seq': 0}, 'data.num_seq: expected 1 or more, got 0'),
    ({'num_extra': -1}, 'data.num_extra: expected 0 or more, got -1'),
    ({'num_res': 0}, 'data.num_res: expected 1 or more'),
    ({'mask_rate': 1.0}, 'data.mask_rate: expected 0 or more, below 1'),
  ],
)
def test_impossible_sizes_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    _sample(**fields)


def test_deletions_of_files_are_counted_before_the_next_column(tmp_path):
  (tmp_path / 'x.a3m').write_text('>q\nM-KV\n>o\nMaaAcK.V\n>p\nee-.-KfVgg\n')
  found = alignments.read(str(tmp_path / 'x.a3m'))
  # The query's gap is dropped; o's A there counts like an insertion.
  assert found.query == 'MKV'
  assert found.deletions.tolist() == [[0, 0, 0], [0, 4, 0], [2, 0, 1]]
