"""Tests of generated protein families."""

import functools

import numpy as np
import pytest

from attention.data import proteins

_LENGTH = 100
_SEEDS = range(20)


@functools.cache
def _family(seed, num_sequences=64):
  return proteins.family(seed, _LENGTH, num_sequences)


def _num_contacts(contacts, separation):
  return np.triu(contacts, separation).sum()


def _log_odds(family, pairs):
  """How often residues meet at the pairs, compared with chance; [20, 20]."""
  observed, expected = np.ones((2, 20, 20))
  for i, j in np.argwhere(pairs):
    columns = family.residues[:, [i, j]]
    columns = columns[(columns != proteins.GAP).all(1)]
    first, second = np.eye(20)[columns.T]
    observed += first.T @ second
    expected += np.outer(first.sum(0), second.mean(0))
  return np.log(observed / expected)


def test_depends_only_on_arguments():
  one, same = (proteins.family(3, 40, 8) for _ in range(2))
  np.testing.assert_array_equal(one.residues, same.residues)
  np.testing.assert_array_equal(one.contacts, same.contacts)
  assert one.secondary == same.secondary
  assert (one.residues != proteins.family(4, 40, 8).residues).any()


def test_fold_is_the_same_for_any_number_of_sequences():
  few, many = (proteins.family(3, 40, count) for count in (1, 50))
  np.testing.assert_array_equal(few.contacts, many.contacts)
  assert few.secondary == many.secondary
  assert few.residues.shape == (1, 40)


@pytest.mark.parametrize('length', [30, 31, 64, 129])
@pytest.mark.parametrize('num_sequences', [1, 5, 33])
def test_shapes_and_ids(length, num_sequences):
  family = proteins.family(0, length, num_sequences)
  assert family.residues.shape == (num_sequences, length)
  assert family.residues.dtype == np.int8
  assert set(np.unique(family.residues)) <= {*range(20), proteins.GAP}
  assert (family.residues[0] != proteins.GAP).all()
  assert family.contacts.shape == (length, length)
  assert family.contacts.dtype == bool
  assert len(family.secondary) == length
  assert set(family.secondary) <= set('HEL')


def test_residues_match_alphafold():
  assert proteins.RESIDUES == 'ARNDCQEGHILKMFPSTWYV'
  assert proteins.GAP == 21


@pytest.mark.parametrize('seed', _SEEDS)
def test_contacts_are_symmetric_and_as_many_as_in_proteins(seed):
  contacts = _family(seed).contacts
  np.testing.assert_array_equal(contacts, contacts.T)
  assert not (np.tril(contacts, 2) & np.triu(contacts, -2)).any()
  assert 0.9 <= _num_contacts(contacts, 6) / _LENGTH <= 3.2


def test_contacts_are_two_per_residue_and_a_third_of_them_distant():
  counts = np.array(
    [
      [_num_contacts(_family(seed).contacts, least) for least in (6, 24)]
      for seed in _SEEDS
    ]
  )
  assert 1.5 < counts[:, 0].mean() / _LENGTH < 3
  assert (counts[:, 1] > 0.2 * counts[:, 0]).all()
  assert counts[:, 1].sum() > counts[:, 0].sum() / 3


def test_helices_have_contacts_of_their_turns():
  for step in (3, 4):
    turn = 'H' * (step + 1)
    inside = [
      family.contacts[i, i + step]
      for family in map(_family, _SEEDS)
      for i in range(_LENGTH - step)
      if family.secondary[i : i + step + 1] == turn
    ]
    assert np.mean(inside) > 0.95  # noise moves few of them beyond 8 Å


def test_secondary_structure_is_in_proportion():
  secondary = [_family(seed).secondary for seed in _SEEDS]
  joined = ''.join(secondary)
  for kind, low, high in (('H', 25, 45), ('E', 15, 35), ('L', 30, 50)):
    assert low <= 100 * joined.count(kind) / len(joined) <= high
  # All-alpha, all-beta and mixed folds occur.
  assert {frozenset(one) for one in secondary} == {
    frozenset('HL'),
    frozenset('EL'),
    frozenset('HEL'),
  }


def test_residues_are_as_frequent_as_in_proteins():
  residues = np.concatenate([_family(seed).residues for seed in _SEEDS])
  residues = residues[residues != proteins.GAP]
  frequencies = np.bincount(residues, minlength=20) / len(residues)
  hydrophobic = [proteins.RESIDUES.index(residue) for residue in 'AVILMFWC']
  assert 0.35 < frequencies[hydrophobic].sum() < 0.5
  assert 0.005 < frequencies.min() < frequencies.max() < 0.15


def test_gaps_are_few_and_mostly_at_the_ends():
  gaps = [_family(seed).residues[1:] == proteins.GAP for seed in _SEEDS]
  rate = np.concatenate(gaps).mean(0)
  assert 0.02 < rate.mean() < 0.08
  assert rate[[0, -1]].min() > 5 * rate[10:-10].mean()


def test_sequences_are_homologs():
  for seed in _SEEDS:
    residues = _family(seed).residues
    one, other = np.triu_indices(len(residues), 1)
    both = (residues[one] != proteins.GAP) & (residues[other] != proteins.GAP)
    same = (residues[one] == residues[other]) & both
    assert 0.2 < same.sum() / both.sum() < 0.45


def test_couplings_pair_what_attracts_in_proteins():
  energy = {
    a + b: proteins.COUPLINGS[i, j]
    for i, a in enumerate(proteins.RESIDUES)
    for j, b in enumerate(proteins.RESIDUES)
  }
  np.testing.assert_allclose(proteins.COUPLINGS, proteins.COUPLINGS.T)
  assert energy['KE'] > 0 > energy['KK']
  assert energy['IL'] > 0 > energy['IK']
  assert energy['WG'] > energy['WW']
  assert energy['CC'] > energy['CA']


def test_residues_follow_the_couplings_at_contacts_only():
  odds = np.zeros((2, 20, 20))
  rng = np.random.default_rng(0)
  for seed in range(4):
    family = _family(seed, 512)
    distant = np.triu(np.ones_like(family.contacts), 6)
    chance = family.contacts.mean()  # about as many pairs
    others = ~family.contacts & (rng.random(distant.shape) < chance)
    for i, pairs in enumerate((family.contacts, others)):
      odds[i] += _log_odds(family, pairs & distant) / 4
  upper = np.triu_indices(20)
  couplings = proteins.COUPLINGS[upper]
  at_contacts, elsewhere = (
    np.polyfit(couplings, one[upper], 1)[0] for one in odds + odds.mT
  )
  assert np.corrcoef(couplings, (odds[0] + odds[0].T)[upper])[0, 1] > 0.7
  assert at_contacts > 0.3
  assert abs(elsewhere) < 0.1 * at_contacts


@pytest.mark.parametrize(
  ('length', 'num_sequences', 'message'),
  [
    (29, 4, 'length: expected 30 or more, got 29'),
    (30, 0, 'num_sequences: expected 1 or more, got 0'),
  ],
)
def test_refuses_sizes_too_small(length, num_sequences, message):
  with pytest.raises(ValueError, match=message):
    proteins.family(0, length, num_sequences)
