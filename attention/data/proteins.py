"""Protein families sampled from Potts models whose couplings follow contacts.

A family is a random fold and an alignment of sequences x that share it:

  p(x) ∝ exp(Σ_i h_i(x_i) + Σ_{i<j} w_ij e(x_i, x_j))

- e(a, b) = Σ_k λ_k p_k(a) p_k(b) is the same in all families, so that contacts
  of one family can be learnt from others. Like hydrophobicities attract each
  other, as do opposite charges, large and small volumes, and cysteines.
- w_ij is the strength of a contact, gamma-distributed, and 0 elsewhere.
- h_i(a) = log f(a) + g_s(a) + b_i p_1(a) + c_i z_ia: how frequent a residue is
  in proteins, its propensity for the secondary structure s of position i, a
  preference of buried positions for hydrophobic residues, and a random
  preference z ~ N(0, 1) of this family.

This is the model that direct coupling analysis fits to real alignments (Morcos
et al. 2011, doi:10.1073/pnas.1111471108). The fold is one of layers of helices,
sheets or both, as coordinates in which Cβ atoms nearer than 8 Å are in contact.

Sources of the figures: frequencies, UniProtKB/Swiss-Prot; hydropathy, Kyte and
Doolittle 1982, doi:10.1016/0022-2836(82)90515-0; volumes in Å³, Zamyatnin 1972,
doi:10.1016/0079-6107(72)90005-3; propensities for helices, strands and turns,
Chou and Fasman 1978, doi:10.1146/annurev.bi.47.070178.001343.
"""

import dataclasses

import numpy as np

RESIDUES = 'ARNDCQEGHILKMFPSTWYV'  # in the order of their ids; 20 is unknown
GAP = 21
_FAR = 6  # separation from which contacts tell of the fold
MIN_LENGTH = 30
_FIGURES = np.array(
  [
    # Frequency %, hydropathy, charge, volume, helix, strand, turn.
    [8.25, 1.8, 0, 88.6, 1.42, 0.83, 0.66],  # A
    [5.53, -4.5, 1, 173.4, 0.98, 0.93, 0.95],  # R
    [4.06, -3.5, 0, 114.1, 0.67, 0.89, 1.56],  # N
    [5.45, -3.5, -1, 111.1, 1.01, 0.54, 1.46],  # D
    [1.37, 2.5, 0, 108.5, 0.70, 1.19, 1.19],  # C
    [3.93, -3.5, 0, 143.8, 1.11, 1.10, 0.98],  # Q
    [6.75, -3.5, -1, 138.4, 1.51, 0.37, 0.74],  # E
    [7.07, -0.4, 0, 60.1, 0.57, 0.75, 1.56],  # G
    [2.27, -3.2, 0, 153.2, 1.00, 0.87, 0.95],  # H
    [5.96, 4.5, 0, 166.7, 1.08, 1.60, 0.47],  # I
    [9.66, 3.8, 0, 166.7, 1.21, 1.30, 0.59],  # L
    [5.84, -3.9, 1, 168.6, 1.16, 0.74, 1.01],  # K
    [2.42, 1.9, 0, 162.9, 1.45, 1.05, 0.60],  # M
    [3.86, 2.8, 0, 189.9, 1.13, 1.38, 0.60],  # F
    [4.70, -1.6, 0, 112.7, 0.57, 0.55, 1.52],  # P
    [6.56, -0.8, 0, 89.0, 0.77, 0.75, 1.43],  # S
    [5.34, -0.7, 0, 116.1, 0.83, 1.19, 0.96],  # T
    [1.08, -0.9, 0, 227.8, 1.08, 1.37, 0.96],  # W
    [2.92, -1.3, 0, 193.6, 0.69, 1.47, 1.14],  # Y
    [6.87, 4.2, 0, 140.0, 1.06, 1.70, 0.50],  # V
  ]
)
_FREQUENCIES = _FIGURES[:, 0] / _FIGURES[:, 0].sum()
_PROPENSITIES = dict(zip('HEL', np.log(_FIGURES[:, 4:].T), strict=True))


def _properties():
  """p_k(a) with mean 0 and, except for cysteine's, variance 1; [4, 20]."""
  cysteine = np.array([residue == 'C' for residue in RESIDUES], float)
  properties = np.stack([*_FIGURES[:, 1:4].T, cysteine])
  properties -= (properties @ _FREQUENCIES)[:, None]
  properties[:3] /= np.sqrt(properties[:3] ** 2 @ _FREQUENCIES)[:, None]
  return properties


PROPERTIES = _properties()
_SCALES = np.array([0.2, -0.15, -0.2, 1.0])  # λ_k
COUPLINGS = np.einsum('k,ka,kb->ab', _SCALES, PROPERTIES, PROPERTIES)  # e

# Direct coupling analysis finds contacts of 100 residues with these figures: of
# the 50 pairs that it ranks first, about 80% with 2,000 sequences, 20% with 32.
_STRENGTH, _SHAPE = 0.8, 0.35  # mean w_ij, and shape of its gamma distribution
_BURIAL = 0.2  # b_i of a position with a mean number of contacts
_CONSERVATION = 3.5  # maximum c_i
_FOUNDERS = 4
_BURN_IN = 40  # sweeps over a founder

# Cβ atoms of helices and strands wind around an axis: radius in Å, degrees per
# residue, Å per residue. Those of a strand alternate between sides of a sheet.
_SHAPES = {'H': (3.3, 100, 1.5), 'E': (2.0, 180, 3.4)}
_SIZES = {'H': (8, 18), 'E': (4, 8), 'L': (2, 8)}  # residues
_SPACING = {'H': 9.0, 'E': 4.8}  # Å between neighbours in a layer
_LAYER = 9.5  # Å between layers
_STEP = 3.6  # Å that a loop can stretch per residue


@dataclasses.dataclass(frozen=True)
class Family:
  """An alignment of n sequences, and the fold of l positions they share."""

  residues: np.ndarray  # [n, l] int8: 0–19, or GAP; row 0 has no gaps
  distances: np.ndarray  # [l, l] between Cβ atoms, in Å
  secondary: str  # [l]: H helix, E strand, L loop

  @property
  def contacts(self) -> np.ndarray:
    """The pairs with couplings, [l, l] bool: nearer than 8 Å, |i - j| >= 3."""
    return _contacts(self.distances)


def family(seed: int, length: int, num_sequences: int) -> Family:
  """Generate a family.

  Args:
    seed: of the random numbers. The fold depends on (seed, length) only.
    length: number of positions, 30 or more.
    num_sequences: number of sequences.

  Raises:
    ValueError: If `length` or `num_sequences` is too small.
  """
  for name, value, least in (
    ('length', length, MIN_LENGTH),
    ('num_sequences', num_sequences, 1),
  ):
    if value < least:
      raise ValueError(f'{name}: expected {least} or more, got {value}')
  rng = np.random.default_rng([seed, length])
  segments = _segments(length, rng)
  secondary = ''.join(kind * size for kind, size in segments)
  points = _fold(segments, rng)
  distances = np.linalg.norm(points[:, None] - points, axis=-1)
  contacts = _contacts(distances)
  fields = _fields(secondary, contacts, rng)
  weights = _weights(contacts, rng)
  residues = _sample(fields, weights, num_sequences, rng).astype(np.int8)
  residues[1:][_gaps(secondary, num_sequences - 1, rng)] = GAP
  return Family(residues, distances, secondary)


def _segments(length, rng):
  """Loops and, between them, helices or strands: [(kind, size), …]."""
  helices = rng.choice([0, 0.5, 1])  # all beta, mixed or all alpha
  segments, room = [], length
  while True:
    kind = 'H' if rng.random() < helices else 'E'
    low, high = _SIZES[kind]
    loop = rng.integers(*_SIZES['L'], endpoint=True)
    # Two helices or more fit into the shortest chain.
    size = rng.integers(low, min(high, length // 3), endpoint=True)
    size = min(size, room - loop - 2)
    if size < low:
      return [*segments, ('L', room)]
    segments += [('L', loop), (kind, size)]
    room -= loop + size


def _fold(segments, rng):
  """Coordinates of Cβ atoms in Å, [l, 3]; segments are parallel to z."""
  free, axis, direction = _slots(segments), None, 1
  # Known positions and their coordinates; the chain begins and ends anywhere.
  known, points, first = [-1], [rng.normal(0, 8, (1, 3))], 0
  for kind, size in segments:
    if kind == 'L':
      loop = size
    else:
      axis, free[kind] = _take(free[kind], axis, loop, rng)
      points.append(_wind(kind, size, axis, direction, rng))
      known.extend(range(first, first + size))
      # Segments an even number apart are parallel, as strands in β–α–β are.
      direction = -direction
    first += size
  points.append(rng.normal(0, 8, (1, 3)))
  known = np.array([*known, first])
  points = _close(known, np.concatenate(points))
  return points + rng.normal(0, 0.5, points.shape)


def _slots(segments):
  """Axes (x, y) of layers of helices, of strands or of both in turn."""
  kinds = sorted({kind for kind, _ in segments} - {'L'})
  steps = np.arange(-len(segments) // 2, len(segments) // 2 + 1)
  slots = {}
  for i, kind in enumerate(kinds):
    layers = _LAYER * steps[steps % len(kinds) == i]
    columns = _SPACING[kind] * steps
    slots[kind] = np.stack(np.meshgrid(columns, layers), -1).reshape(-1, 2)
  return slots


def _take(free, previous, loop, rng):
  """A free slot near the centre within the loop's reach; and those left."""
  cost = np.hypot(free[:, 0], free[:, 1] - _LAYER / 2)
  cost += rng.normal(0, 3, len(free))
  if previous is not None:
    away = np.linalg.norm(free - previous, axis=1)
    cost += away / 2 + 10 * np.maximum(away - _STEP * (loop + 1), 0)
  best = cost.argmin()
  return free[best], np.delete(free, best, axis=0)


def _wind(kind, size, axis, direction, rng):
  """Coordinates of a helix or strand, right-handed in either direction."""
  radius, turn, rise = _SHAPES[kind]
  # Strands of a sheet share one grid of heights and alternate in phase.
  phase = np.pi / 2 if kind == 'E' else rng.uniform(0, 2 * np.pi)
  steps = direction * (np.arange(size) - size // 2) + rng.integers(-1, 2)
  angles = phase + np.radians(turn) * steps
  x = axis[0] + radius * np.cos(angles)
  y = axis[1] + radius * np.sin(angles)
  return np.stack([x, y, rise * steps], -1)


def _close(known, points):
  """Fill the gaps between known positions with loops that arch outwards."""
  positions = np.arange(known[-1])
  filled = np.stack([np.interp(positions, known, x) for x in points.T], -1)
  for i in np.flatnonzero(np.diff(known) > 1):
    chord = np.linalg.norm(points[i + 1] - points[i])
    size = known[i + 1] - known[i]
    height = np.sqrt(max((_STEP * size) ** 2 - chord**2, 0)) / 2
    outwards = np.sign(points[i, 2] + points[i + 1, 2])
    loop = np.arange(1, size)
    arch = outwards * height * np.sin(np.pi * loop / size)
    filled[known[i] + loop, 2] += arch
  return filled


def _contacts(distances):
  return (distances < 8) & (_separations(len(distances)) >= 3)


def _separations(length):
  return np.abs(np.subtract.outer(np.arange(length), np.arange(length)))


def _fields(secondary, contacts, rng):
  """h_i(a), [20, l]."""
  propensities = np.stack([_PROPENSITIES[kind] for kind in secondary], -1)
  counts = (contacts & (_separations(len(contacts)) >= _FAR)).sum(0)
  buried = counts / max(counts.mean(), 1)
  noise = rng.normal(size=(20, len(contacts)))
  return (
    np.log(_FREQUENCIES)[:, None]
    + propensities
    + _BURIAL * buried * PROPERTIES[0][:, None]
    + rng.uniform(0, _CONSERVATION, len(contacts)) * noise
  )


def _weights(contacts, rng):
  """w_ij, [l, l]; few are strong, and those within turns of helices weak."""
  strengths = np.triu(rng.gamma(_SHAPE, _STRENGTH / _SHAPE, contacts.shape))
  near = _separations(len(contacts)) < _FAR
  return contacts * (strengths + strengths.T) * np.where(near, 0.3, 1)


def _sample(fields, weights, count, rng):
  """Sequences that descend from a few founders by Gibbs sampling, [n, l].

  Each generation doubles the sequences and then resamples all of them. Since
  founders are samples of the model, so are their descendants; the later the
  common ancestor of two, the more alike they are.
  """
  sites = _independent(weights > 0)
  chains = rng.choice(20, (len(weights), _FOUNDERS), p=_FREQUENCIES)
  for _ in range(_BURN_IN):
    _resample(chains, fields, weights, sites, rng)
  while chains.shape[1] < count:
    chains = np.tile(chains, 2)
    _resample(chains, fields, weights, sites, rng)
  return chains.T[:count]


def _independent(graph):
  """Sets of positions without couplings inside a set, by greedy colouring."""
  colours = np.full(len(graph), -1)
  for i, neighbours in enumerate(graph):
    colours[i] = min(set(range(len(graph))) - set(colours[neighbours]))
  return [np.flatnonzero(colours == i) for i in range(colours.max() + 1)]


def _resample(chains, fields, weights, sites, rng):
  """Replace each residue by a sample of p(x_i | x_j, j ≠ i); [l, n] in place.

  Residues of one set of positions depend only on others and change at once.
  """
  properties = PROPERTIES[:, chains]  # [k, l, n]
  for rows in sites:
    around = _SCALES[:, None, None] * (weights[rows] @ properties)
    energies = np.tensordot(PROPERTIES, around, (0, 0))
    energies += fields[:, rows, None]
    cumulative = np.exp(energies).cumsum(0)
    draws = rng.random(cumulative.shape[1:]) * cumulative[-1]
    chains[rows] = (cumulative[:-1] < draws).sum(0)
    properties[:, rows] = PROPERTIES[:, chains[rows]]


def _gaps(secondary, count, rng):
  """Runs of gaps, mostly at the ends and in loops; [n, l] bool."""
  length = len(secondary)
  begins = np.where([kind == 'L' for kind in secondary], 0.01, 0.003)
  gaps = rng.random((count, length)) < begins
  extends = rng.random((count, length)) < 0.7
  for i in range(1, length):
    gaps[:, i] |= gaps[:, i - 1] & extends[:, i]
  head, tail = rng.geometric(0.4, (2, count, 1)) - 1
  positions = np.arange(length)
  return gaps | (positions < head) | (positions >= length - tail)
