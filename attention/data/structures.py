"""Distances between the residues of a protein structure."""

import pathlib

import numpy as np

# Suffixes of structure files, and Biopython's parsers of them.
SUFFIXES = {
  '.pdb': 'PDBParser',
  '.ent': 'PDBParser',
  '.cif': 'MMCIFParser',
  '.mmcif': 'MMCIFParser',
}
_LEAST_MATCH = 0.6  # of the residues, for a structure of the same protein


def distances(path: str, chain: str, query: str) -> np.ndarray:
  """Read the distances between a protein's residues from a structure.

  A residue is at its Cβ, glycine at its Cα. Residues are matched to the
  sequence by a global alignment.

  Args:
    path: a PDB (.pdb, .ent) or mmCIF (.cif, .mmcif) file.
    chain: name of a chain, as the authors gave it; '' for the only chain.
    query: sequence of the protein, in letters.

  Returns:
    [l, l] float64 in Å; nan for residues that the structure lacks.

  Raises:
    ValueError: Biopython is not installed; the file is no structure, has no
      such chain, or holds another protein.
    OSError: the file cannot be read.
  """
  residues = _residues(path, chain)
  sequence = ''.join(letter for letter, _ in residues)
  positions = np.full((len(query), 3), np.nan)
  matches = 0
  for i, j in _align(query, sequence):
    matches += query[i] == sequence[j]
    positions[i] = residues[j][1]
  expected = min(len(query), len(sequence))
  if matches < _LEAST_MATCH * expected:
    raise ValueError(
      f'{path}: expected a structure of the first sequence of the alignment; '
      f'{matches} of its {len(query)} residues match the {len(sequence)} of '
      f'the chain'
    )
  return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


def _residues(path, chain):
  """List (letter, position [3]) of a chain's residues."""
  try:
    from Bio import PDB
    from Bio.Data.PDBData import protein_letters_3to1_extended as codes
  except ImportError:
    raise ValueError(
      "structures need Biopython: pip install 'attention[data]'"
    ) from None
  suffix = pathlib.Path(path).suffix.lower()
  if suffix not in SUFFIXES:
    raise ValueError(
      f'{path}: expected a structure with one of the suffixes '
      f'{", ".join(SUFFIXES)}, got {suffix!r}'
    )
  pathlib.Path(path).read_bytes()  # errors of the system, before the parser's
  try:
    parser = getattr(PDB, SUFFIXES[suffix])(QUIET=True)
    models = list(parser.get_structure('', path))
  except Exception as error:  # parsers raise many kinds
    raise ValueError(f'{path}: not a structure: {error}') from None
  chains = {c.id: c for c in models[0]} if models else {}
  chains = {
    name: [r for r in c if 'CA' in r and r.resname in codes]
    for name, c in chains.items()
  }
  chains = {name: found for name, found in chains.items() if found}
  if not chains:
    raise ValueError(f'{path}: no protein chain in it')
  if not chain and len(chains) == 1:
    (chain,) = chains
  if chain not in chains:
    raise ValueError(
      f'{path}: --chain: expected one of {", ".join(sorted(chains))}, got '
      f'{chain!r}'
    )
  return [
    (
      codes[r.resname],
      r['CB' if 'CB' in r and r.resname != 'GLY' else 'CA'].coord,
    )
    for r in chains[chain]
  ]


def _align(query, sequence):
  """List pairs of positions of a global alignment of two sequences."""
  from Bio.Align import PairwiseAligner

  aligner = PairwiseAligner(
    mode='global',
    match_score=2,
    mismatch_score=-1,
    open_gap_score=-3,
    extend_gap_score=-0.2,
  )
  best = aligner.align(query, sequence)[0]
  return [
    pair
    for (i, last), (j, _) in zip(*best.aligned, strict=True)
    for pair in zip(range(i, last), range(j, j + last - i), strict=True)
  ]
