"""Contact maps: scores of pairs of residues, and how good they are.

A contact is a pair of residues whose Cβ (Cα for glycine) are less than 8 Å
apart. Scores are symmetric arrays [l, l]; higher means more likely in contact.
"""

import pathlib

import numpy as np

from attention.data.proteins import RESIDUES

NEAR = 8.0  # Å
SEPARATIONS = {'all': 6, 'long': 24}  # least distance along the sequence
FRACTIONS = (1, 2, 5)  # of the length: the top L, L/2 and L/5 pairs
_NUM_RESIDUES = len(RESIDUES)  # gaps and unknown residues are one more state
_PSEUDOCOUNT = 0.5  # weight of uniform frequencies, against those observed


def mean_field_dca(residues: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Score pairs by mean-field direct-coupling analysis.

  The couplings are the negative inverse of the covariance of one-hot residues
  (Morcos et al. 2011, equation 9).

  Args:
    residues: [n, l] ids; those from 20 on are one state, the gap.
    weights: [n], one per sequence.

  Returns:
    [l, l], as `coupling_scores`.
  """
  length, kinds = residues.shape[1], _NUM_RESIDUES
  one_hot = np.eye(kinds + 1, kinds, dtype=np.float32)
  rows = one_hot[np.minimum(residues, kinds)].reshape(len(residues), -1)
  share = (weights / weights.sum()).astype(np.float32)
  observed = ((rows * share[:, None]).T @ rows).astype(np.float64)
  single = np.diag(observed)
  uniform = _PSEUDOCOUNT / (kinds + 1)
  single = (1 - _PSEUDOCOUNT) * single + uniform
  pairs = (1 - _PSEUDOCOUNT) * observed + uniform / (kinds + 1)
  # A residue is of one kind only.
  blocks = pairs.reshape(length, kinds, length, kinds)
  columns = np.arange(length)
  blocks[columns, :, columns] = single.reshape(length, kinds, 1) * np.eye(kinds)
  couplings = -np.linalg.inv(pairs - np.outer(single, single))
  couplings = couplings.reshape(length, kinds, length, kinds)
  # The gap's couplings are zero.
  padding = (0, 0), (0, 1), (0, 0), (0, 1)
  return coupling_scores(np.pad(couplings, padding))


def coupling_scores(couplings: np.ndarray) -> np.ndarray:
  """Score pairs by the sizes of their couplings.

  The score is the Frobenius norm over the twenty residues in the zero-sum
  gauge, minus its expectation from the means of the rows, the average-product
  correction (Dunn et al. 2008; Ekeberg et al. 2013, section II).

  Args:
    couplings: [l, kinds, l, kinds]; the two of a pair are averaged, and kinds
      from 20 on are not scored.

  Returns:
    [l, l], with 0 on the diagonal.
  """
  kinds = (1, 3)
  couplings = (couplings + couplings.transpose(2, 3, 0, 1)) / 2
  couplings = (
    couplings
    - couplings.mean(1, keepdims=True)
    - couplings.mean(3, keepdims=True)
    + couplings.mean(kinds, keepdims=True)
  )[:, :_NUM_RESIDUES, :, :_NUM_RESIDUES]
  scores = np.sqrt(np.square(couplings, dtype=np.float64).sum(kinds))
  np.fill_diagonal(scores, 0)
  length = len(scores)
  means = scores.sum(0) / max(length - 1, 1)
  total = scores.sum() / max(length * (length - 1), 1)
  scores = scores - np.outer(means, means) / max(total, 1e-30)
  np.fill_diagonal(scores, 0)
  return scores


def ranked(
  scores: np.ndarray, separation: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pairs (i, j) with j - i >= separation, by falling score."""
  i, j = np.triu_indices(len(scores), separation)
  order = np.argsort(-scores[i, j], kind='stable')
  return i[order], j[order]


def best_pairs(query: str, scores: np.ndarray, count: int = 10) -> str:
  """List the pairs of highest score, such as 'K3 – V27', a line each."""
  i, j = ranked(scores, SEPARATIONS['all'])
  return '\n'.join(
    f'{query[a]}{a + 1} – {query[b]}{b + 1}'
    for a, b in zip(i[:count], j[:count], strict=True)
  )


def precisions(scores: np.ndarray, contacts: np.ndarray) -> dict[str, float]:
  """Return the fraction of contacts among the pairs of highest score.

  Args:
    scores: [l, l].
    contacts: [l, l]: 1 or True for contacts, nan for pairs that are unknown,
      which are left out.

  Returns:
    Fractions by name: 'all L/1', 'all L/2', 'all L/5', 'long L/1', …; without
    names for which there is no known pair.
  """
  found = {}
  for name, separation in SEPARATIONS.items():
    i, j = ranked(scores, separation)
    truth = np.asarray(contacts, np.float64)[i, j]
    truth = truth[~np.isnan(truth)]
    for part in FRACTIONS:
      if len(truth):
        top = truth[: max(1, len(scores) // part)]
        found[f'{name} L/{part}'] = float(top.mean())
  return found


def of_distances(distances: np.ndarray) -> np.ndarray:
  """1 for distances [l, l] in Å of contacts, 0 for others, nan for unknown."""
  return np.where(np.isnan(distances), np.nan, distances < NEAR)


def write(path: pathlib.Path, query: str, scores: np.ndarray) -> None:
  """Write the ranked pairs at separation 6 or more.

  Args:
    path: a file with the suffix .csv (columns i, j, score; positions from 1),
      or any other for CASP's RR format, whose probabilities are scores divided
      by the highest.
    query: the sequence, in letters.
    scores: [l, l].
  """
  i, j = ranked(scores, SEPARATIONS['all'])
  values = scores[i, j]
  pairs = zip(i + 1, j + 1, values, strict=True)
  if path.suffix.lower() == '.csv':
    lines = ['i,j,score', *(f'{a},{b},{s:.6g}' for a, b, s in pairs)]
  else:
    highest = max(values.max(initial=0), 1e-30)
    lines = ['PFRMAT RR', 'MODEL 1']
    lines += [query[k : k + 50] for k in range(0, len(query), 50)]
    lines += [
      f'{a} {b} 0 {NEAR:.0f} {max(s / highest, 0):.4f}' for a, b, s in pairs
    ]
    lines.append('END')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n')
