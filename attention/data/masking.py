"""Masked samples of alignments (Jumper et al. 2021, Suppl. 1.2.6 and 1.2.7).

A sample has the query and other rows, drawn at random, of which residues are
masked, and extra rows, which are not. Each extra row belongs to the row that it
agrees with most, and a row's profile is the mean of the rows that belong to it.
"""

import dataclasses

import numpy as np

from attention.data.alignments import UNKNOWN, Alignment
from attention.data.proteins import GAP

MASK = 22
NUM_CLASSES = 23  # twenty residues, unknown, gap, mask
_NUM_RESIDUES = UNKNOWN
# What a masked residue becomes: any, one of the profile's, itself; else MASK.
_ANY, _PROFILE, _SAME = 0.1, 0.1, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """Draws samples of fixed shapes; smaller alignments are padded."""

  num_seq: int  # rows
  num_extra: int = 0  # rows of the extra alignment
  num_res: int  # columns; longer alignments are cropped
  mask_rate: float = 0.15

  def __post_init__(self):
    for field, least in (('num_seq', 1), ('num_extra', 0), ('num_res', 1)):
      if (value := getattr(self, field)) < least:
        raise ValueError(f'data.{field}: expected {least} or more, got {value}')
    if not 0 <= self.mask_rate < 1:
      raise ValueError(
        f'data.mask_rate: expected 0 or more, below 1, got {self.mask_rate}'
      )

  def sample(self, alignment: Alignment, rng) -> dict[str, np.ndarray]:
    """Draw a sample; s, e and i are num_seq, num_extra and num_res.

    Args:
      alignment: rows and distances.
      rng: a NumPy generator.

    Returns:
      'query' [i], 'msa' and 'targets' [s, i]: ids, int32, with and without
      masked residues.
      'is_masked' [s, i], 'msa_mask' [s, i], 'extra_mask' [e, i] and 'res_mask'
      [i]: bool; the masks are False in padding.
      'extra_msa' [e, i] int32.
      'deletions' [s, i], 'extra_deletions' [e, i], 'mean_deletions' [s, i] and
      'profile' [s, i, 23]: float32.
      'residue_index' [i] int32, counted from the start of the alignment.
      'distances' [i, i] float32 in Å; nan where unknown.
    """
    size, length = alignment.residues.shape
    first = rng.integers(max(length - self.num_res, 0) + 1)
    columns = slice(first, first + self.num_res)
    count = min(size, self.num_seq + self.num_extra)
    rows = np.append(0, 1 + rng.permutation(size - 1))[:count]
    residues = alignment.residues[rows, columns].astype(np.int32)
    deletions = np.zeros(residues.shape, np.float32)
    if alignment.deletions is not None:
      deletions += alignment.deletions[rows, columns]
    distances = np.full((residues.shape[1],) * 2, np.nan, np.float32)
    if alignment.distances is not None:
      distances[:] = alignment.distances[columns, columns]

    s = self.num_seq
    targets, extra = residues[:s], residues[s:]
    is_masked = rng.random(targets.shape) < self.mask_rate
    family = alignment.residues[:, columns]
    frequencies = [(family == kind).mean(0) for kind in range(NUM_CLASSES)]
    msa = _replace(targets, is_masked, np.stack(frequencies, -1), rng)
    profile, mean_deletions = _summarise(msa, extra, deletions)
    arrays = {
      'query': residues[0],
      'msa': msa,
      'targets': targets,
      'is_masked': is_masked,
      'msa_mask': np.ones(targets.shape, bool),
      'extra_msa': extra,
      'extra_mask': np.ones(extra.shape, bool),
      'res_mask': np.ones(len(distances), bool),
      'deletions': deletions[:s],
      'extra_deletions': deletions[s:],
      'mean_deletions': mean_deletions,
      'profile': profile,
      'residue_index': np.arange(len(distances), dtype=np.int32) + first,
      'distances': distances,
    }
    return {name: self._pad(name, x) for name, x in arrays.items()}

  def _pad(self, name, x):
    """Pad rows and columns to their fixed numbers."""
    if name in ('query', 'res_mask', 'residue_index'):
      sizes = [self.num_res]
    elif name == 'distances':
      sizes = [self.num_res] * 2
    else:
      is_extra = name.startswith('extra')
      sizes = [self.num_extra if is_extra else self.num_seq, self.num_res]
    widths = [(0, n - size) for n, size in zip(sizes, x.shape, strict=False)]
    widths += [(0, 0)] * (x.ndim - len(widths))
    fill = np.nan if name == 'distances' else 0
    return np.pad(x, widths, constant_values=fill)


def column_profile(sample: dict) -> np.ndarray:
  """Guess each residue as the most frequent of its column: [s, i] ids.

  Masked residues are not counted.
  """
  counts = _one_hot(sample['targets'])
  counts *= (sample['msa_mask'] & ~sample['is_masked'])[..., None]
  return np.broadcast_to(counts.sum(0).argmax(-1), sample['targets'].shape)


def _one_hot(residues):
  return np.eye(NUM_CLASSES, dtype=np.float32)[residues]


def _replace(residues, is_masked, frequencies, rng):
  """Replace masked residues [s, i], given frequencies [i, 23] of columns."""
  draws = rng.random(residues.shape)
  cumulative = frequencies.cumsum(-1)
  cumulative /= cumulative[:, -1:]
  likely = (rng.random((*residues.shape, 1)) >= cumulative).sum(-1)
  choices = [
    rng.integers(_NUM_RESIDUES, size=residues.shape),
    likely.clip(max=GAP),
    residues,
  ]
  edges = np.cumsum([_ANY, _PROFILE, _SAME])
  replaced = np.select([draws < edge for edge in edges], choices, MASK)
  return np.where(is_masked, replaced, residues).astype(np.int32)


def _summarise(msa, extra, deletions):
  """Profiles [s, i, 23] and mean deletions [s, i] of rows and their extras."""
  num_seq, num_res = msa.shape
  rows, extras = _one_hot(msa), _one_hot(extra)
  # Gaps and masks tell nothing about kinship.
  kinds = rows[..., :GAP].reshape(num_seq, -1)
  agreement = kinds @ extras[..., :GAP].reshape(len(extra), kinds.shape[1]).T
  nearest = np.eye(num_seq, dtype=np.float32)[agreement.argmax(0)].T
  counts = 1 + nearest.sum(1)[:, None]
  flat = extras.reshape(len(extra), num_res * NUM_CLASSES)
  total = rows + (nearest @ flat).reshape(rows.shape)
  deleted = deletions[:num_seq] + nearest @ deletions[num_seq:]
  return total / counts[..., None], deleted / counts
