"""Contacts in a protein family, learned by predicting residues from others."""

import functools
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import models
from attention.data import contacts
from attention.data.alignments import Alignment, Rows
from attention.models.losses import token_cross_entropy
from attention.models.pairwise import NUM_RESIDUES
from attention.training.parallelism import processes


class Contacts:
  """One alignment and a pairwise model, built from `model_fields`.

  The loss is the negative pseudo-log-likelihood of the residues. A penalty of
  decay / 2 · Σ couplings² is added to its weighted sum over the alignment
  (Ekeberg et al. 2013, equation 12).
  """

  is_per_token = False
  command = 'contacts'
  loss_unit = 'nats per residue'
  example_name = 'best pairs'

  def __init__(self, length: int, model: dict, data: Rows | None = None):
    """Create a task; `create` and `load` do so from a config."""
    self.data = data
    self._length = length
    fields = dict(model)
    self._decay = fields.pop('decay')
    if not 0 <= self._decay < np.inf:
      raise ValueError(f'model.decay: expected 0 or more, got {self._decay}')
    self.model_fields = {'length': length, **fields}
    make = functools.partial(models.create, 'pairwise', **self.model_fields)

    def forward(residues):
      model = make()
      return model(residues), model.couplings()

    self._model = hk.without_apply_rng(hk.transform(forward))
    self._couplings = hk.without_apply_rng(
      hk.transform(lambda: make().couplings())
    )

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Contacts':
    """Create the task of a config, with its data; `record` is not used."""
    del record
    data = Rows.load(seed=config.seed, **config.data)
    length = data.alignment.residues.shape[1]
    return cls(length, config.model.to_dict(), data)

  @classmethod
  def load(cls, config, record: dict) -> 'Contacts':
    """Create the task from a run's config and data record, without data."""
    return cls(record['length'], config.model.to_dict())

  def record(self) -> dict:
    """Return what identifies the data and what using the model requires."""
    return {'sha256': self.alignment.sha256, 'length': self._length}

  def describe(self) -> str:
    n, length = self.alignment.residues.shape
    return (
      f'{self.alignment.name}, {n:,} sequences of {length} columns '
      f'(effectively {self.alignment.effective_number:,.0f}), sha256 '
      f'{self.alignment.sha256[:8]}…'
    )

  @property
  def alignment(self) -> Alignment:
    return self.data.alignment

  @property
  def batch_size(self) -> int:
    return self.data.batch_size

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self._length

  def batch(self, step: int) -> dict[str, np.ndarray]:
    return self.data.batch(step)

  def init(self, rng):
    """Initialise parameters; biases are the columns' log frequencies."""
    params = self._model.init(rng, np.zeros((1, self._length), np.int32))
    if self.data is None:
      return params
    # Otherwise couplings would learn first what single columns explain.
    (name,) = params
    return {name: {**params[name], 'bias': self._log_frequencies()}}

  def _log_frequencies(self):
    """Log frequencies of the residues of each column, centred: [l, 20]."""
    rows, weights = self.alignment.residues, self.alignment.weights
    counts = [weights @ (rows == kind) for kind in range(NUM_RESIDUES)]
    logs = np.log(np.stack(counts, -1) + 1)
    return jnp.float32(logs - logs.mean(-1, keepdims=True))

  def loss(self, params, rng, batch):
    """Return the total loss in nats, with penalty, and the residue count."""
    del rng
    logits, couplings = self._model.apply(params, batch['residues'])
    total, count = _residue_cross_entropy(logits, batch['residues'])
    size = jnp.square(couplings.astype(jnp.float32)).sum()
    share = len(logits) / self.alignment.effective_number  # of the alignment
    return total + share * self._decay / 2 * size, count

  def evaluate(self, params, place) -> dict[str, float]:
    """Evaluate on all sequences, by their weights.

    Returns:
      'eval/loss' in nats per residue, without the penalty; for a generated
      family also 'eval/all_L1', …, the precisions of its contacts.
    """
    total = count = 0.0
    residues, weights = self.alignment.residues, self.alignment.weights
    size = self.batch_size
    for first in range(0, len(residues), size):
      rows = np.arange(first, first + size)
      batch = {
        'residues': residues[rows % len(residues)].astype(np.int32),
        'weights': np.where(
          rows < len(residues), weights[rows % len(residues)], 0
        ).astype(np.float32),
      }
      nats, number = self._evaluate_batch(params, place(batch))
      total, count = total + float(nats), count + float(number)
    values = {'eval/loss': total / count}
    if self.alignment.contacts is not None:
      scores = self.scores(processes.gather(params))
      found = contacts.precisions(scores, self.alignment.contacts)
      for name, value in found.items():
        values[f'eval/{name.replace(" L/", "_L")}'] = value
    return values

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits, _ = self._model.apply(params, batch['residues'])
      return _residue_cross_entropy(
        logits, batch['residues'], batch['weights'][:, None]
      )

    return evaluate_batch

  def scores(self, params) -> np.ndarray:
    """Score all pairs of positions by their couplings: [l, l]."""
    couplings = jax.jit(self._couplings.apply)(params)
    return contacts.coupling_scores(np.asarray(couplings, np.float32))

  def example(self, params, seed: int) -> str:
    """List the pairs of highest score."""
    del seed
    self._shown = self.scores(params)
    return contacts.best_pairs(self.alignment.query, self._shown)

  def draw(self, folder: pathlib.Path) -> None:
    """Draw the map of the scores of the last example."""
    from attention import plots

    plots.contact_map(
      self._shown, self.alignment.contacts, folder / 'contacts.png'
    )


def _residue_cross_entropy(logits, residues, weights=1.0):
  """Weighted total in nats and weight of the residues that are not void."""
  is_residue = residues < NUM_RESIDUES
  weights = jnp.where(is_residue, weights, 0.0)
  targets = jnp.where(is_residue, residues, 0)
  nats = token_cross_entropy(logits, targets)
  return (nats * weights).sum(), weights.sum()
