"""Families of proteins, generated and read from folders."""

import numpy as np
import pytest

from attention.data import families
from attention.data.alignments import letters
from attention.data.families import Families

_SIZES = dict(num_seq=3, num_extra=2, num_res=30)
_GENERATED = dict(num_families=5, num_held_out=3, num_sequences=4, **_SIZES)


def _load(**fields):
  return Families.load(**{'batch_size': 2, 'seed': 0, **_GENERATED, **fields})


def _same(one, two):
  return all(
    np.array_equal(one[k], two[k], equal_nan=one[k].dtype.kind == 'f')
    for k in one
  )


def test_batches_depend_on_seed_and_step_only():
  one, two = _load(), _load()
  two.batch(4)
  assert _same(one.batch(7), two.batch(7))
  assert not _same(one.batch(7), one.batch(8))
  assert not _same(one.batch(7), _load(seed=1).batch(7))
  assert one.batch(0)['msa'].shape == (2, 3, 30)


def test_an_epoch_has_every_family_once():
  data = _load(batch_size=5)
  known = {letters(family.residues[0]) for family in data.train}
  assert len(known) == 5
  for step in range(3):
    assert {letters(query) for query in data.batch(step)['query']} == known


def test_held_out_families_are_others_and_always_the_same():
  data = _load()
  train = {letters(f.residues[0]) for f in data.train}
  batches = list(data.held_out_batches(2))
  assert [len(found) for _, found in batches] == [2, 1]
  assert all(len(batch['msa']) == 2 for batch, _ in batches)
  held_out = {letters(f.residues[0]) for _, found in batches for f in found}
  assert len(held_out) == 3 and not held_out & train
  for (one, _), (two, _) in zip(batches, data.held_out_batches(2), strict=True):
    assert _same(one, two)
  # Samples do not depend on the size of a batch.
  single = [batch for batch, _ in data.held_out_batches(1)]
  assert _same(single[1], {k: x[1:] for k, x in batches[0][0].items()})


def _write_folder(folder, count=12):
  for i in range(count):
    query = 'MKVLAE' + 'ACDE'[i % 4] * 3
    (folder / f'f{i}_A.a3m').write_text(f'>q\n{query}\n>o\n{query[::-1]}\n')
  (folder / 'README').write_text('not an alignment')
  return str(folder)


def _write_structure(path, query, chain='A'):
  names = dict(
    zip(
      'MKVLAECD',
      ['MET', 'LYS', 'VAL', 'LEU', 'ALA', 'GLU', 'CYS', 'ASP'],
      strict=True,
    )
  )
  path.write_text(
    ''.join(
      f'ATOM  {i:5d}  CA  {names[a]} {chain}{i:4d}    {3.8 * i:8.3f}   0.000'
      '   0.000  1.00  0.00           C\n'
      for i, a in enumerate(query, 1)
    )
  )


def test_a_folder_is_read_with_its_structures(tmp_path):
  folder = _write_folder(tmp_path)
  _write_structure(tmp_path / 'f3.pdb', 'MKVLAEEEE')
  _write_structure(tmp_path / 'f4_A.pdb', 'MKVLAEAAA', chain='Z')
  data = _load(path=folder)
  assert (len(data.train), len(data.held_out)) == (11, 1)
  found = {f.name.rsplit('/', 1)[1]: f for f in (*data.train, *data.held_out)}
  for name, family in found.items():
    if name in ('f3_A.a3m', 'f4_A.a3m'):
      assert family.distances[0, 2] == pytest.approx(7.6)
    else:
      assert family.distances is None
  assert data.batch(0)['res_mask'].sum() == 18


def test_a_new_family_leaves_the_held_out_ones(tmp_path):
  folder = _write_folder(tmp_path, 20)
  before = _load(path=folder)
  (tmp_path / 'new.fasta').write_text('>q\nMKV\n>o\nMKA\n')
  after = _load(path=folder)
  assert after.sha256 != before.sha256
  names = {f.name for f in before.held_out}
  assert len(names & {f.name for f in after.held_out}) >= 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_families': 0}, 'data.num_families: expected 1 or more, got 0'),
    ({'num_held_out': 0}, 'data.num_held_out: expected 1 or more, got 0'),
    ({'num_sequences': 1}, 'data.num_sequences: expected 2 or more, got 1'),
    ({'batch_size': 0}, 'data.batch_size: expected 1 or more, got 0'),
    ({'num_res': 7}, 'data.num_res: expected 30 or more, got 7'),
  ],
)
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _load(**changes)


def test_mistakes_in_a_folder_are_reported(tmp_path):
  with pytest.raises(ValueError, match='expected 2 or more alignments .* got'):
    families.read_folder(str(tmp_path))
  with pytest.raises(FileNotFoundError):
    families.read_folder(str(tmp_path / 'none'))
  folder = _write_folder(tmp_path)
  _write_structure(tmp_path / 'f3_A.pdb', 'DDDDDDDDD')
  with pytest.raises(ValueError, match=r'f3_A.pdb: .* residues match'):
    families.read_folder(folder)
  (tmp_path / 'f3_A.pdb').unlink()
  (tmp_path / 'f5_A.a3m').write_text('>q\nMKV\n>o\nMKVL\n')
  with pytest.raises(ValueError, match="f5_A.a3m: line 3: sequence 'o' fills"):
    families.read_folder(folder)
