"""Telling the class of a sequence: of patches, or of a text's tokens."""

import functools
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import models, plots
from attention.capture import capture
from attention.data import classification
from attention.models.losses import cross_entropy


class Classification:
  """A classifier, of `model_fields`, that learns from examples."""

  command = 'evaluate'
  loss_unit = 'nats per example'
  example_name = 'the classes most often taken for another'

  def __init__(self, labels, vocabulary, shape, model: dict, data=None):
    """See `create` and `load`; `data` is None where nothing is trained."""
    self.labels = labels
    self.vocabulary = vocabulary
    self.data = data
    self._shape = tuple(shape)  # of one input
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
    """From a config, with its data, whatever was recorded of it before."""
    del record
    data = classification.load(seed=config.seed, **config.data)
    sample = data.batch(0)['inputs'][0]
    return cls(
      data.labels, data.vocabulary, sample.shape, config.model.to_dict(), data
    )

  @classmethod
  def load(cls, config, record: dict) -> 'Classification':
    """From a run's config and data record, without the data."""
    vocabulary = None
    if record['vocabulary'] is not None:
      vocabulary = classification.Words(tuple(record['vocabulary']))
    elif config.data.kind == 'text':
      vocabulary = classification.Bytes()
    model = config.model.to_dict()
    return cls(record['labels'], vocabulary, record['shape'], model)

  def record(self) -> dict:
    """What identifies the data, and what is needed to use the model."""
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
      f'{data.name}, {len(data.train):,} examples of {len(self.labels)} '
      f'classes and {len(data.held_out):,} held out, sha256 '
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
    """Nats, with dropout, and the number of examples."""
    logits = self._model.apply(
      params, rng, batch['inputs'], batch['lengths'], True
    )
    return cross_entropy(logits, batch['targets'])

  def evaluate(self, params, place) -> dict[str, float]:
    """Nats per example and the share that is right, of all held out."""
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
    """The confusion matrix of the last evaluation."""
    plots.confusion_matrix(
      self._confusion, self.labels, folder / 'confusion.png'
    )

  def example(self, params, seed: int) -> str:
    """The classes most often taken for another."""
    del params, seed
    wrong = self._confusion - np.diag(np.diag(self._confusion))
    worst = np.argsort(wrong, axis=None)[::-1][:5]
    lines = [
      f'{self.labels[i]} taken for {self.labels[j]}: {wrong[i, j]}'
      for i, j in zip(*np.unravel_index(worst, wrong.shape), strict=True)
      if wrong[i, j]
    ]
    return '\n'.join(lines) or 'all held-out examples are right'

  def patterns(self, params, text: str, **selection) -> dict:
    """What the model attends to in a text; see `Language.patterns`."""
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
    print(f'the model takes this for {guess!r}')
    some = next(iter(found.values()))
    if some.shape[-1] > len(labels):
      labels = ['[first]', *labels]  # pooling='first'
    return {'attention': (labels, labels, found)}
