"""Masked residues and contacts of many protein families."""

import dataclasses
import functools
import math
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import models
from attention.capture import capture
from attention.data import alignments, contacts, masking
from attention.data.alignments import Alignment, sequence_weights
from attention.data.families import Families
from attention.interop import alphafold_npz
from attention.models import msa
from attention.models.losses import token_cross_entropy
from attention.ops import meshes
from attention.training.parallelism import processes

_NUM_SAMPLES = 8  # of the rows of an alignment, at most


class Msa:
  """Families of proteins and an Evoformer, built from `model_fields`.

  The loss of a family is msa_weight times the mean negative log-likelihood of
  its masked residues, plus distogram_weight times that of its known distances.
  """

  is_per_token = False
  has_pairs = True
  command = 'contacts'
  loss_unit = 'nats'
  example_name = 'best pairs of a held-out family'

  def __init__(self, model: dict, sampler, data: Families | None = None):
    """Create a task; `create` and `load` do so from a config."""
    self.data, self._sampler = data, sampler
    fields = dict(model)
    path = fields.pop('params')
    names = 'msa_weight', 'distogram_weight'
    self._weights = [fields.pop(name) for name in names]
    for name, weight in zip(names, self._weights, strict=True):
      if not 0 <= weight < np.inf:
        raise ValueError(f'model.{name}: expected 0 or more, got {weight}')
    self.model_fields = fields

    def forward(sample, is_training=False):
      model = models.create('msa', **fields)
      return model(msa.make_features(sample), is_training=is_training)

    self._model = hk.transform(forward)
    self._path = path

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Msa':
    """Create the task of a config, with its data; `record` is not used."""
    del record
    data = Families.load(seed=config.seed, **config.data)
    return cls(config.model.to_dict(), data.sampler, data)

  @classmethod
  def load(cls, config, record: dict) -> 'Msa':
    """Create the task from a run's config and data record, without data."""
    del record
    data = config.data
    sampler = masking.Sampler(
      num_seq=data.num_seq, num_extra=data.num_extra, num_res=data.num_res
    )
    return cls(config.model.to_dict(), sampler)

  def record(self) -> dict:
    """Return what identifies the data."""
    return {'sha256': self.data.sha256}

  def describe(self) -> str:
    data, sampler = self.data, self._sampler
    return (
      f'{data.name}, {len(data.train):,} to train on and '
      f'{len(data.held_out):,} held out, {sampler.num_seq} + '
      f'{sampler.num_extra} rows of {sampler.num_res} columns, sha256 '
      f'{data.sha256[:8]}…'
    )

  @functools.cached_property
  def pretrained(self) -> dict | None:
    """The parameters to start from, if the config names a file of them.

    Raises:
      ValueError: the file has other parameters.
      OSError: it cannot be read.
    """
    if not self._path:
      return None
    shapes = jax.eval_shape(self.init, jax.random.key(0))
    return alphafold_npz.load_msa_params(self._path, shapes)

  @property
  def batch_size(self) -> int:
    return self.data.batch_size

  @property
  def tokens_per_step(self) -> int:
    """Residues of the alignments, without extra rows."""
    return self.batch_size * self._sampler.num_seq * self._sampler.num_res

  def batch(self, step: int) -> dict[str, np.ndarray]:
    return self.data.batch(step)

  def init(self, rng):
    sample = self._sampler.sample(
      Alignment('', np.zeros((1, 1), np.int8)), np.random.default_rng(0)
    )
    return self._model.init(rng, sample)

  def loss(self, params, rng, batch):
    """Return the total loss of the families and their number."""
    count = len(batch['msa'])

    def loss(rng, sample):
      logits = self._model.apply(params, rng, sample, is_training=True)
      nats, counts, _ = _score(logits, sample)
      return self._weigh(nats / jnp.maximum(counts, 1))

    losses = meshes.vmap(loss)(jax.random.split(rng, count), batch)
    return losses.sum(), jnp.float32(count)

  def _weigh(self, losses):
    return sum(w * x for w, x in zip(self._weights, losses, strict=True))

  def evaluate(self, params, place) -> dict[str, float]:
    """Evaluate on the held-out families.

    Returns:
      'eval/loss', weighted like the training loss; 'eval/msa_loss' and
      'eval/distogram_loss' in nats per masked residue and per pair;
      'eval/accuracy' of masked residues and 'eval/profile_accuracy', of the
      most frequent residue of their column; 'eval/all_L2' and
      'eval/long_L2', the mean precisions of contacts, and 'eval/dca_all_L2' and
      'eval/dca_long_L2', of mean-field DCA.
    """
    totals, found = np.zeros((3, 2)), []
    for batch, families in self.data.held_out_batches(self.batch_size):
      scores, near = processes.gather(
        self._evaluate_batch(params, place(batch))
      )
      count = len(families)
      totals += np.stack([np.asarray(x)[:count].sum(0) for x in scores])
      for scores, distances in zip(
        np.asarray(near)[:count], batch['distances'], strict=False
      ):
        truth = contacts.of_distances(distances)
        found.append(contacts.precisions(scores, truth))
    nats, _, hits = totals / np.maximum(totals[1], 1)
    return {
      'eval/loss': self._weigh(nats),
      'eval/msa_loss': nats[0],
      'eval/distogram_loss': nats[1],
      'eval/accuracy': hits[0],
      **_mean_precisions('eval/', found),
      **self._baselines,
    }

  @functools.cached_property
  def _evaluate_batch(self):
    def evaluate(params, sample):
      logits = self._model.apply(params, None, sample)
      near = msa.contact_probabilities(logits['distances'])
      return _score(logits, sample), near

    return jax.jit(lambda *inputs: meshes.vmap(evaluate, (None, 0))(*inputs))

  @functools.cached_property
  def _baselines(self):
    """What counting finds in the held-out samples."""
    hits = count = 0
    found = []
    for batch, _ in self.data.held_out_batches(1):
      sample = {name: x[0] for name, x in batch.items()}
      is_hit = masking.column_profile(sample) == sample['targets']
      hits += is_hit[sample['is_masked']].sum()
      count += sample['is_masked'].sum()
      where = np.ix_(sample['msa_mask'].any(1), sample['res_mask'])
      rows = sample['targets'][where]
      truth = contacts.of_distances(sample['distances'])
      length = len(rows[0])
      found.append(
        contacts.precisions(
          contacts.mean_field_dca(rows, sequence_weights(rows)),
          truth[:length, :length],
        )
      )
    return {
      'eval/profile_accuracy': hits / max(count, 1),
      **_mean_precisions('eval/dca_', found),
    }

  @property
  def alignment(self) -> Alignment:
    """The held-out family that examples and contact maps are of."""
    return self.data.held_out[0]

  def scores(self, params, alignment: Alignment | None = None) -> np.ndarray:
    """Compute the probabilities of contacts.

    They are means over several samples of the rows of a large alignment.

    Args:
      params: model parameters.
      alignment: of any size; `self.alignment` by default.

    Returns:
      [l, l].
    """
    alignment = alignment or self.alignment
    size = self._sampler.num_seq + self._sampler.num_extra
    count = min(_NUM_SAMPLES, math.ceil(len(alignment.residues) / size))
    return np.mean(
      [
        self._near(params, self._sample(alignment, seed))
        for seed in range(count)
      ],
      axis=0,
    )

  @functools.cached_property
  def _near(self):
    @jax.jit
    def near(params, sample):
      logits = self._model.apply(params, None, sample)
      return msa.contact_probabilities(logits['distances'])

    return near

  def _sample(self, alignment, seed=0):
    """Draw rows of an alignment, without masks, cropping or padding."""
    size, length = alignment.residues.shape
    sampler = dataclasses.replace(
      self._sampler,
      num_seq=min(self._sampler.num_seq, size),
      num_res=length,
      mask_rate=0.0,
    )
    return sampler.sample(alignment, np.random.default_rng(seed))

  def example(self, params, seed: int) -> str:
    """List the pairs of highest score in a held-out family."""
    del seed
    self._shown = self.scores(params)
    return contacts.best_pairs(self.alignment.query, self._shown)

  def draw(self, folder: pathlib.Path) -> None:
    """Draw the contact map of the last example."""
    from attention import plots

    plots.contact_map(
      self._shown, self.alignment.contacts, folder / 'contacts.png'
    )

  def patterns(self, params, text: str, **selection) -> dict:
    """Capture the attention patterns in an alignment.

    Args:
      params: model parameters.
      text: path of an alignment; see `alignments.read`.
      **selection: layers and heads, see `attention.capture`.

    Returns:
      By axis of attention, (query labels, key labels, patterns by module path),
      averaged over the alignment's rows, its columns, or third residues.

    Raises:
      ValueError: as `alignments.read`, or a layer or head does not exist.
      OSError: the file cannot be read.
    """
    alignment = alignments.read(text)
    run = jax.jit(functools.partial(capture, self._model, **selection))
    sample = self._sample(alignment)
    _, found = run(params, sample)
    residues = [f'{a}{i}' for i, a in enumerate(alignment.query, 1)]
    rows = [str(i) for i in range(len(sample['msa']))]
    axes = {}
    for path, pattern in found.items():
      kind = next(k for k in ('row', 'column', 'triangle') if k in path)
      labels = rows if kind == 'column' else residues
      # [blocks, batch, h, q, k]; patterns of padding are 0.
      total = np.asarray(pattern, np.float32).sum(-4)
      mean = total / np.maximum(total.sum(-1, keepdims=True), 1e-30)
      # The extra rows' columns have other labels.
      if mean.shape[-2:] == (len(labels), len(labels)):
        axes.setdefault(kind, (labels, labels, {}))[2][path] = mean
    return axes


def _score(logits, sample):
  """Sums over masked residues, and over pairs: nats, counts and hits, [2]."""
  parts = (
    (logits['msa'], sample['targets'], sample['is_masked']),
    (
      logits['distances'],
      jnp.searchsorted(msa.BREAKS, sample['distances']),
      ~jnp.isnan(sample['distances']),
    ),
  )
  scores = []
  for values, targets, is_target in parts:
    nats = token_cross_entropy(values, targets)
    hits = values.argmax(-1) == targets
    scores.append(
      [
        jnp.where(is_target, x, 0).sum(dtype=jnp.float32)
        for x in (nats, 1, hits)
      ]
    )
  return tuple(map(jnp.stack, zip(*scores, strict=True)))


def _mean_precisions(prefix, found):
  """Means of the top L/2, over the families with known contacts."""
  means = {}
  for kind in contacts.SEPARATIONS:
    values = [x[f'{kind} L/2'] for x in found if f'{kind} L/2' in x]
    if values:
      means[f'{prefix}{kind}_L2'] = float(np.mean(values))
  return means
