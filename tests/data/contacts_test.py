"""Scores of pairs, precisions and files of contacts."""

import numpy as np
import pytest

from attention.data import alignments, contacts, proteins, structures


def _random_scores(length, seed=0):
  scores = np.random.default_rng(seed).normal(size=(length, length))
  return scores + scores.T


def test_precisions_count_known_pairs_only():
  length = 30
  scores, truth = np.zeros((2, length, length))
  for rank, (i, j, is_contact) in enumerate(
    [(0, 6, 1), (0, 7, np.nan), (1, 25, 0), (2, 9, 1), (0, 5, 1), (0, 24, 1)]
  ):
    scores[i, j] = scores[j, i] = 10 - rank
    truth[i, j] = truth[j, i] = is_contact
  found = contacts.precisions(scores, truth)
  # Of the first six known pairs, at distances 6, 24, 7, 24; 3 are contacts.
  assert found['all L/5'] == 3 / 6
  assert found['long L/5'] == 1 / 6
  assert found['all L/1'] == 3 / 30
  assert set(found) == {
    f'{kind} L/{part}' for kind in ('all', 'long') for part in (1, 2, 5)
  }


def test_a_short_protein_has_no_long_range():
  found = contacts.precisions(_random_scores(12), np.zeros((12, 12)))
  assert set(found) == {'all L/1', 'all L/2', 'all L/5'}


def test_scores_do_not_depend_on_the_gauge():
  rng = np.random.default_rng(0)
  couplings = rng.normal(size=(7, 21, 7, 21))
  shift = rng.normal(size=(7, 21, 7))
  moved = couplings + shift[..., None] + shift.transpose(2, 0, 1)[:, None]
  scores = contacts.coupling_scores(couplings)
  np.testing.assert_allclose(scores, contacts.coupling_scores(moved))
  turned = couplings.transpose(2, 3, 0, 1)
  np.testing.assert_allclose(scores, contacts.coupling_scores(turned))
  np.testing.assert_allclose(scores, scores.T)
  assert not np.diag(scores).any()


def test_the_average_product_correction_removes_what_positions_share():
  entropy = np.random.default_rng(0).uniform(1, 2, 40)
  norms = np.outer(entropy, entropy)
  norms[3, 30] = norms[30, 3] = norms[3, 30] + 1
  couplings = np.zeros((40, 2, 40, 2))
  signs = np.array([[1, -1], [-1, 1]]) / 2  # of norm 1, in the zero-sum gauge
  couplings += norms[:, None, :, None] * signs[None, :, None]
  i, j = contacts.ranked(contacts.coupling_scores(couplings), 6)
  assert (i[0], j[0]) == (3, 30)


def test_mean_field_dca_finds_the_contacts_of_a_generated_family():
  family = proteins.family(1, 60, 1_000)
  scores = contacts.mean_field_dca(family.residues, np.ones(1_000))
  assert contacts.precisions(scores, family.contacts)['all L/2'] > 0.6


@pytest.mark.parametrize(
  ('name', 'structure', 'chain', 'expected'),
  [
    ('4i6p_B', '4i6p.cif', 'B', [0.25, 0.24, 0.35, 0.29]),
    ('4zey_A', '4zey.cif', 'A', [0.10, 0.07, 0.31, 0.19]),
    pytest.param(
      *('6kwc_1_A', '6kwc_predicted.pdb', '', [0.56, 0.36, 0.79, 0.84]),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_mean_field_dca_has_the_published_precision(
  name, structure, chain, expected, real_files
):
  folder = real_files / 'msa'
  alignment = alignments.read(str(folder / f'{name}.a3m'))
  truth = contacts.of_distances(
    structures.distances(str(folder / structure), chain, alignment.query)
  )
  scores = contacts.mean_field_dca(alignment.residues, alignment.weights)
  found = contacts.precisions(scores, truth)
  names = 'all L/1', 'long L/1', 'all L/5', 'long L/5'
  assert np.abs(np.subtract([found[n] for n in names], expected)).max() < 0.03


@pytest.mark.parametrize('suffix', ['rr', 'csv'])
def test_pairs_are_written_by_rank(tmp_path, suffix):
  scores, query = _random_scores(60), 'ACDEF' * 12
  path = tmp_path / 'new' / f'pairs.{suffix}'
  contacts.write(path, query, scores)
  lines = path.read_text().splitlines()
  i, j = contacts.ranked(scores, 6)
  if suffix == 'csv':
    assert lines[0] == 'i,j,score'
    rows = [line.split(',') for line in lines[1:]]
    np.testing.assert_allclose(
      [float(row[2]) for row in rows], scores[i, j], rtol=1e-5
    )
  else:
    assert lines[:2] == ['PFRMAT RR', 'MODEL 1'] and lines[-1] == 'END'
    assert lines[2] + lines[3] == query
    rows = [line.split() for line in lines[4:-1]]
    assert all(row[2:4] == ['0', '8'] for row in rows)
    shares = [float(row[4]) for row in rows]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
  assert [(int(r[0]), int(r[1])) for r in rows] == list(
    zip(i + 1, j + 1, strict=True)
  )
