"""Classification of a sequence of image patches or of text tokens."""

import functools
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import models
from attention.capture import capture
from attention.data import classification
from attention.models.losses import cross_entropy


class Classification:
  """Classification task; the classifier is built from `model_fields`."""

  command = 'evaluate'
  loss_unit = 'nats per example'
  example_name = 'most frequent confusions'

  def __init__(self, labels, vocabulary, shape, model: dict, data=None):
    """Create a task; use `create`, or `load` to use a model without data."""
    self.labels = labels
    self.vocabulary = vocabulary
    self.data = data
    self._shape = tuple(shape)  # shape of one input
    self._confusion = None
    self.model_fields = {
      'num_classes': len(labels),
      'context_size': shape[0],
      'vocab_size': None if vocabulary is None else vocabulary.size,
      **model,
    }
    self._model = hk.transform(
      lambda inputs, lengths, is_training=False: models.create(
        'classifier', **self.model_fields
      )(inputs, lengths, is_training=is_training)
    )

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Classification':
    """Create the task of a config, with its data; `record` is not used."""
    del record
    data = classification.load(seed=config.seed, **config.data)
    sample = data.batch(0)['inputs'][0]
    return cls(
      data.labels, data.vocabulary, sample.shape, config.model.to_dict(), data
    )

  @classmethod
  def load(cls, config, record: dict) -> 'Classification':
    """Create the task from a run's config and data record, without data."""
    vocabulary = None
    if record['vocabulary'] is not None:
      vocabulary = classification.Words(tuple(record['vocabulary']))
    elif config.data.kind == 'text':
      vocabulary = classification.Bytes()
    model = config.model.to_dict()
    return cls(record['labels'], vocabulary, record['shape'], model)

  def record(self) -> dict:
    """Return what identifies the data and what using the model requires."""
    words = getattr(self.vocabulary, 'words', None)
    return {
      'sha256': self.data.sha256,
      'labels': list(self.labels),
      'vocabulary': None if words is None else list(words),
      'shape': list(self._shape),
    }

  def describe(self) -> str:
    data = self.data
    return (
      f'{data.name}, {len(self.labels)} classes, {len(data.train):,} training '
      f'and {len(data.held_out):,} held-out examples, sha256 '
      f'{data.sha256[:8]}…'
    )

  @property
  def batch_size(self) -> int:
    return self.data.batch_size

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self._shape[0]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    return self.data.batch(step)

  def init(self, rng):
    dtype = np.float32 if self.vocabulary is None else np.int32
    inputs = np.zeros((1, *self._shape), dtype)
    return self._model.init(rng, inputs, np.ones(1, np.int32))

  def loss(self, params, rng, batch):
    """Return the total loss in nats, with dropout, and the example count."""
    logits = self._model.apply(
      params, rng, batch['inputs'], batch['lengths'], True
    )
    return cross_entropy(logits, batch['targets'])

  def evaluate(self, params, place) -> dict[str, float]:
    """Return the held-out loss in nats per example, and the accuracy."""
    total = 0.0
    confusion = np.zeros((len(self.labels),) * 2, int)
    for batch in self.data.held_out_batches(4 * self.batch_size):
      nats, counts = self._evaluate_batch(params, place(batch))
      total += float(nats)
      confusion += np.asarray(counts)
    self._confusion = confusion
    return {
      'eval/loss': total / confusion.sum(),
      'eval/accuracy': np.trace(confusion) / confusion.sum(),
    }

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits = self._model.apply(
        params, None, batch['inputs'], batch['lengths']
      )
      is_real = batch['is_real']
      nats, _ = cross_entropy(logits, batch['targets'], is_real)
      counts = jnp.zeros((len(self.labels),) * 2, jnp.int32)
      guesses = logits.argmax(-1)
      return nats, counts.at[batch['targets'], guesses].add(is_real)

    return evaluate_batch

  def draw(self, folder: pathlib.Path) -> None:
    """Draw the confusion matrix of the last evaluation."""
    from attention import plots

    plots.confusion_matrix(
      self._confusion, self.labels, folder / 'confusion.png'
    )

  def example(self, params, seed: int) -> str:
    """List the most frequent confusions of the last evaluation."""
    del params, seed
    wrong = self._confusion - np.diag(np.diag(self._confusion))
    worst = np.argsort(wrong, axis=None)[::-1][:5]
    lines = [
      f'{self.labels[i]} mistaken for {self.labels[j]}: {wrong[i, j]}'
      for i, j in zip(*np.unravel_index(worst, wrong.shape), strict=True)
      if wrong[i, j]
    ]
    return '\n'.join(lines) or 'all held-out examples are classified correctly'

  def patterns(self, params, text: str, **selection) -> dict:
    """Capture the attention patterns in a text; see `Language.patterns`."""
    if self.vocabulary is None:
      raise ValueError('text: this model reads images, not text')
    tokens = self.vocabulary.encode(text)
    if not 0 < len(tokens) <= self._shape[0]:
      raise ValueError(
        f'text: expected 1 to {self._shape[0]} tokens (the context_size), got '
        f'{len(tokens)}'
      )
    labels = self.vocabulary.decode(tokens)
    run = jax.jit(functools.partial(capture, self._model, **selection))
    logits, found = run(params, tokens[None], np.array([len(tokens)]))
    guess = self.labels[int(logits.argmax())]
    print(f'predicted class: {guess!r}')
    some = next(iter(found.values()))
    if some.shape[-1] > len(labels):
      labels = ['[first]', *labels]  # pooling='first'
    return {'attention': (labels, labels, found)}
