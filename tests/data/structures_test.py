"""Distances from structure files."""

import numpy as np
import pytest

from attention.data.structures import distances

SEQUENCE = 'MKVLAEGDRTWYFHIQNPSC'
_LETTERS = 'ARNDCQEGHILKMFPSTWYV'
_CODES = (
  'ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR '
  'VAL'
)
_NAMES = dict(zip(_LETTERS, _CODES.split(' '), strict=True))


def _atom(number, name, residue, chain, index, position):
  x, y, z = position
  return (
    f'ATOM  {number:>5}  {name:<3} {_NAMES[residue]} {chain}{index:>4}    '
    f'{x:>8.3f}{y:>8.3f}{z:>8.3f}  1.00  0.00           C'
  )


def _pdb(tmp_path, chains, missing=()):
  """Residues on a line, Cα 3 Å and Cβ 4 Å apart; `missing` have no atoms."""
  lines, number = [], 0
  for chain, sequence in chains.items():
    for i, residue in enumerate(sequence):
      if i in missing:
        continue
      for name, position in (('CA', (3.0 * i, 0, 0)), ('CB', (4.0 * i, 1, 0))):
        number += 1
        lines.append(_atom(number, name, residue, chain, i + 1, position))
  path = tmp_path / 'structure.pdb'
  path.write_text('\n'.join([*lines, 'END', '']))
  return str(path)


def test_distances_are_between_beta_carbons_and_alpha_of_glycine(tmp_path):
  found = distances(_pdb(tmp_path, {'A': SEQUENCE}), 'A', SEQUENCE)
  glycine = SEQUENCE.index('G')
  assert found[0, 2] == pytest.approx(8)
  assert found[0, glycine] == pytest.approx(np.hypot(3 * glycine, 1))
  np.testing.assert_allclose(found, found.T)


def test_unresolved_and_foreign_residues_are_left_out(tmp_path):
  path = _pdb(tmp_path, {'A': SEQUENCE}, missing=(5, 6))
  found = distances(path, '', 'MM' + SEQUENCE)  # a chain that begins later
  unknown = np.isnan(np.diag(found))
  assert np.flatnonzero(unknown).tolist() == [0, 1, 7, 8]
  assert found[2, 4] == pytest.approx(8)


@pytest.mark.parametrize(
  ('chain', 'query', 'message'),
  [
    ('C', SEQUENCE, "--chain: expected one of A, B, got 'C'"),
    ('', SEQUENCE, "--chain: expected one of A, B, got ''"),
    ('B', SEQUENCE, r'\d+ of its 20 residues match the 20 of the chain'),
  ],
)
def test_wrong_chains_and_proteins_are_refused(tmp_path, chain, query, message):
  path = _pdb(tmp_path, {'A': SEQUENCE, 'B': SEQUENCE[::-1]})
  with pytest.raises(ValueError, match=message):
    distances(path, chain, query)


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('x.pdb', 'nothing\n', 'no protein chain'),
    ('x.cif', 'nothing\n', 'not a structure|no protein chain'),
    ('x.xyz', '', r"one of the suffixes .*, got '\.xyz'"),
  ],
)
def test_files_without_a_structure_are_refused(tmp_path, name, text, message):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    distances(str(path), '', SEQUENCE)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
  with pytest.raises(FileNotFoundError):
    distances(str(tmp_path / 'x.pdb'), '', SEQUENCE)
