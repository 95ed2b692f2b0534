"""Multiple sequence alignments: files, sequence weights and batches of rows."""

import dataclasses
import functools
import hashlib
import pathlib

import numpy as np

from attention.data import contacts, proteins
from attention.data.files import read_lines
from attention.data.proteins import GAP, RESIDUES

UNKNOWN = 20
# Ambiguous and rare residues, as HHblits and AlphaFold read them.
_IDS = {
  **{letter: i for i, letter in enumerate(RESIDUES)},
  'B': 3,
  'J': UNKNOWN,
  'O': UNKNOWN,
  'U': 4,
  'X': UNKNOWN,
  'Z': 6,
  '-': GAP,
  '.': GAP,
}
_FORMATS = {
  'a3m': ('.a3m',),
  'fasta': ('.afa', '.aln', '.fa', '.fas', '.fasta'),
  'stockholm': ('.sto', '.stk', '.stockholm'),
}
_IDENTITY = 0.8  # from which on sequences count as copies of each other


@dataclasses.dataclass(frozen=True)
class Alignment:
  """Homologous sequences, in the columns that the first of them fills."""

  name: str  # source of the alignment
  residues: np.ndarray  # [n, l] int8 ids; row 0, the query, has no gaps
  # Residues of each row left of each column that the query lacks, [n, l].
  deletions: np.ndarray | None = None  # None: no row has any
  distances: np.ndarray | None = None  # [l, l] in Å, nan or None if unknown

  @property
  def query(self) -> str:
    """The first sequence, in letters."""
    return letters(self.residues[0])

  @property
  def contacts(self) -> np.ndarray | None:
    """True contacts [l, l], nan or None if unknown."""
    if self.distances is None:
      return None
    return contacts.of_distances(self.distances)

  @functools.cached_property
  def sha256(self) -> str:
    return hashlib.sha256(self.residues.tobytes()).hexdigest()

  @functools.cached_property
  def weights(self) -> np.ndarray:
    """One weight per sequence; their sum is the effective number."""
    return sequence_weights(self.residues)

  @property
  def effective_number(self) -> float:
    return float(self.weights.sum())


@dataclasses.dataclass(frozen=True)
class Rows:
  """Batches of an alignment's rows, drawn in proportion to their weights."""

  alignment: Alignment
  batch_size: int
  seed: int

  @classmethod
  def load(
    cls,
    *,
    path: str = '',
    length: int = 0,
    num_sequences: int = 0,
    batch_size: int,
    seed: int,
  ) -> 'Rows':
    """Read an alignment, or generate a family with known contacts.

    Args:
      path: see `read`; '' for a generated family.
      length: number of columns of the generated family.
      num_sequences: its number of sequences.
      batch_size: rows per batch.
      seed: of the generated family and of the batches.

    Raises:
      ValueError: a size is out of range, or as `read`.
      OSError: the file cannot be read.
    """
    if batch_size < 1:
      raise ValueError(f'data.batch_size: expected 1 or more, got {batch_size}')
    if path:
      return cls(read(path), batch_size, seed)
    if num_sequences < 2:
      raise ValueError(
        f'data.num_sequences: expected 2 or more, got {num_sequences}'
      )
    return cls(generate(seed, length, num_sequences), batch_size, seed)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Return {'residues': [batch_size, l] int32}, the same for equal steps."""
    weights = self.alignment.weights
    rng = np.random.default_rng([self.seed, step])
    rows = rng.choice(len(weights), self.batch_size, p=weights / weights.sum())
    return {'residues': self.alignment.residues[rows].astype(np.int32)}


def generate(seed: int, length: int, num_sequences: int) -> Alignment:
  """Generate a family with known distances; see `proteins.family`.

  Raises:
    ValueError: `length` or `num_sequences` is too small, by its config key.
  """
  try:
    family = proteins.family(seed, length, num_sequences)
  except ValueError as error:
    raise ValueError(f'data.{error}') from None
  name = f'a generated family (seed {seed})'
  distances = np.float32(family.distances)
  return Alignment(name, family.residues, distances=distances)


def letters(residues) -> str:
  """Spell residues [l] in letters; gaps are '-'."""
  return ''.join(f'{RESIDUES}X-'[i] for i in residues)


def read(path: str) -> Alignment:
  """Read an alignment, plain or gzip.

  The formats, by suffix, are a3m (.a3m), aligned FASTA (.fasta, .fa, .afa,
  .aln, .fas) and Stockholm (.sto, .stk). Columns in which the first sequence
  has a gap are dropped, like the insertions of a3m (lower case and '.'), and
  their residues counted as deletions.

  Raises:
    ValueError: an unknown suffix, fewer than two sequences, sequences of
      different lengths, or letters that are no residues; the message has the
      line.
    OSError: the file cannot be read.
  """
  kind = kind_of(path)
  if kind is None:
    known = ', '.join(s for suffixes in _FORMATS.values() for s in suffixes)
    raise ValueError(
      f'{path}: expected an alignment with one of the suffixes {known} (or '
      f'with .gz after it), got {_suffix(path)!r}'
    )
  lines = read_lines(path)
  parse = _stockholm if kind == 'stockholm' else _fasta
  is_a3m = kind == 'a3m'
  records = parse(path, lines)
  rows = [_row(path, is_a3m, *record) for record in records]
  if len(rows) < 2:
    raise ValueError(
      f'{path}: expected an alignment of 2 or more sequences, got {len(rows)}'
    )
  length = len(rows[0][0])
  for (row, _), (number, name, _) in zip(rows, records, strict=True):
    if len(row) != length:
      raise ValueError(
        f'{path}: line {number}: sequence {name!r} fills {len(row)} columns, '
        f'expected {length} as in the first sequence'
      )
  residues, deletions = map(np.stack, zip(*rows, strict=True))
  is_kept = residues[0] != GAP
  if not is_kept.any():
    raise ValueError(f'{path}: the first sequence has no residues')
  # Residues in dropped columns come before the next column that is kept.
  dropped = (residues != GAP) & ~is_kept
  before = (deletions + dropped).cumsum(1)[:, is_kept]
  deletions = np.diff(before, axis=1, prepend=0).astype(np.int16)
  return Alignment(path, residues[:, is_kept], deletions)


def kind_of(path: str) -> str | None:
  """'a3m', 'fasta' or 'stockholm', by the suffix; None for other files."""
  kinds = [k for k, known in _FORMATS.items() if _suffix(path) in known]
  return kinds[0] if kinds else None


def _suffix(path):
  return pathlib.Path(path.removesuffix('.gz')).suffix.lower()


def _fasta(path, lines):
  """List (line number, name, sequence) of a FASTA file."""
  records = []
  for number, line in enumerate(lines, 1):
    line = line.strip()
    if line.startswith('>'):
      name = (line[1:].split() or [''])[0]
      records.append([number, name, ''])
    elif line.startswith('#') and not records:
      continue  # a comment before the first sequence, as HHblits writes
    elif not records and line:
      raise ValueError(
        f"{path}: line {number}: expected '>' and a name before a sequence, "
        f'got {line[:20]!r}'
      )
    elif line:
      records[-1][2] += line
  return records


def _stockholm(path, lines):
  """List (line number, name, sequence) of a Stockholm file, joining blocks."""
  records = {}
  for number, line in enumerate(lines, 1):
    if line.startswith('//'):
      break
    if line.startswith('#') or not line.strip():
      continue
    words = line.split()
    if len(words) != 2:
      raise ValueError(
        f'{path}: line {number}: expected a name and a sequence, got '
        f'{len(words)} words'
      )
    name, part = words
    records.setdefault(name, [number, name, ''])[2] += part
  return list(records.values())


def _row(path, is_a3m, number, name, sequence):
  """Encode a sequence: ids [l] int8, and its insertions before each, [l]."""
  inserted = np.array([is_a3m and c.islower() for c in sequence], bool)
  is_dot = np.array([is_a3m and c == '.' for c in sequence], bool)
  is_column = ~inserted & ~is_dot
  insertions = np.diff(inserted.cumsum()[is_column], prepend=0)
  letters = [c for c, x in zip(sequence.upper(), is_column, strict=True) if x]
  try:
    return np.array([_IDS[c] for c in letters], np.int8), insertions
  except KeyError as error:
    column = letters.index(error.args[0]) + 1
    raise ValueError(
      f'{path}: line {number}: sequence {name!r} has {error.args[0]!r} in '
      f'column {column}, which is no residue'
    ) from None


def sequence_weights(residues: np.ndarray) -> np.ndarray:
  """Weight each sequence by 1 / the number of sequences like it.

  Sequences are alike if they agree in 80% of the columns or more (Morcos et al.
  2011, equation 3); each is like itself.

  Args:
    residues: [n, l].

  Returns:
    [n] float64.
  """
  alike = [(residues == row).mean(1) >= _IDENTITY for row in residues]
  return 1 / np.sum(alike, 1)
