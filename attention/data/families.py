"""Many protein families, read from a folder or generated, in batches."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from attention.data import alignments, proteins, structures
from attention.data.alignments import Alignment
from attention.data.masking import Sampler

_HELD_OUT = 0.1  # of the families of a folder
# Seeds of generated families that are held out, far from those of training.
_HELD_OUT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class Families:
  """Training and held-out families, as samples of fixed shapes."""

  name: str
  train: Sequence[Alignment]
  held_out: Sequence[Alignment]
  sha256: str
  sampler: Sampler
  batch_size: int
  seed: int

  @classmethod
  def load(
    cls,
    *,
    path: str = '',
    num_families: int = 0,
    num_held_out: int = 0,
    num_sequences: int = 0,
    batch_size: int,
    seed: int,
    **sizes,
  ) -> 'Families':
    """Read the families of a folder, or prepare to generate some.

    Args:
      path: a folder of alignments; see `read_folder`. '': generated families.
      num_families: number of generated families to train on.
      num_held_out: number of others, to evaluate on.
      num_sequences: number of sequences of each generated family.
      batch_size: samples per batch.
      seed: of the generated families and of the samples.
      **sizes: fields of `Sampler`; generated families have num_res columns.

    Raises:
      ValueError: a size is out of range, or as `read_folder`.
      OSError: a file cannot be read.
    """
    sampler = Sampler(**sizes)
    _check(batch_size=(batch_size, 1))
    if path:
      families = read_folder(path)
      digest = hashlib.sha256()
      for family in families:
        digest.update(family.sha256.encode())
      count = max(1, round(_HELD_OUT * len(families)))
      parts = families[count:], families[:count]
      return cls(path, *parts, digest.hexdigest(), sampler, batch_size, seed)
    _check(
      num_families=(num_families, 1),
      num_held_out=(num_held_out, 1),
      num_sequences=(num_sequences, 2),
      num_res=(sampler.num_res, proteins.MIN_LENGTH),
    )
    fields = sampler.num_res, num_sequences
    parts = (
      _Generated(seed * num_families, num_families, *fields),
      _Generated(_HELD_OUT_SEED + seed * num_held_out, num_held_out, *fields),
    )
    digest = hashlib.sha256(parts[0][0].residues.tobytes()).hexdigest()
    name = 'generated families'
    return cls(name, *parts, digest, sampler, batch_size, seed)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Return samples, stacked; see `Sampler.sample`. Equal for equal steps."""
    samples = []
    for n in range(step * self.batch_size, (step + 1) * self.batch_size):
      epoch, i = divmod(n, len(self.train))
      family = self.train[int(_order(self.seed, epoch, len(self.train))[i])]
      rng = np.random.default_rng([self.seed, n])
      samples.append(self.sampler.sample(family, rng))
    return _stack(samples)

  def held_out_batches(self, batch_size: int):
    """Yield (samples, stacked; their alignments) of all held-out families.

    The last batch is filled up with its last sample.
    """
    for first in range(0, len(self.held_out), batch_size):
      families = list(self.held_out[first : first + batch_size])
      samples = [
        self.sampler.sample(
          family, np.random.default_rng([self.seed, 1, first + i])
        )
        for i, family in enumerate(families)
      ]
      samples += samples[-1:] * (batch_size - len(samples))
      yield _stack(samples), families


def read_folder(path: str) -> list[Alignment]:
  """Read alignments and the structures beside them, ordered by chance.

  NAME.a3m (or another alignment, see `alignments.read`) belongs with a
  structure NAME.pdb of one chain, or with chain C of ID.cif if NAME is ID_C.

  Raises:
    ValueError: fewer than two alignments, or as `alignments.read` and
      `structures.distances`.
    OSError: a file cannot be read.
  """
  files = sorted(pathlib.Path(path).iterdir())
  found = [file for file in files if alignments.kind_of(file.name)]
  if len(found) < 2:
    raise ValueError(
      f'{path}: expected 2 or more alignments in this folder, got {len(found)}'
    )
  # A hash of their names, so that a new family leaves the order of the others.
  found.sort(key=lambda f: hashlib.sha256(f.name.encode()).hexdigest())
  known = {
    f.stem: str(f) for f in files if f.suffix.lower() in structures.SUFFIXES
  }
  families = []
  for file in found:
    family = alignments.read(str(file))
    name = file.name.removesuffix('.gz')
    name = name[: name.rindex('.')]
    entry, _, chain = name.rpartition('_')
    structure, chain = (
      (known[name], '') if name in known else (known.get(entry), chain)
    )
    if structure:
      distances = structures.distances(structure, chain, family.query)
      family = dataclasses.replace(family, distances=np.float32(distances))
    families.append(family)
  return families


class _Generated(Sequence):
  """Families of consecutive seeds, generated when they are first needed."""

  def __init__(self, first_seed: int, count: int, *fields):
    self._first_seed, self._count, self._fields = first_seed, count, fields
    self._families = {}

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(self._count))]
    if not 0 <= i < self._count:
      raise IndexError(i)
    if i not in self._families:
      family = alignments.generate(self._first_seed + i, *self._fields)
      self._families[i] = family
    return self._families[i]


@functools.lru_cache(2)
def _order(seed, epoch, count):
  return np.random.default_rng([seed, 0, epoch]).permutation(count)


def _check(**values):
  for key, (value, least) in values.items():
    if value < least:
      raise ValueError(f'data.{key}: expected {least} or more, got {value}')


def _stack(samples):
  return {name: np.stack([s[name] for s in samples]) for name in samples[0]}
