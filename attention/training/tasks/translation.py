"""Sequence-to-text tasks: translation, reading tones."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import decoding, models
from attention.capture import capture
from attention.data import translation
from attention.data.subwords import Subwords
from attention.data.vocabularies import END, START, Bytes, Framed
from attention.models.losses import cross_entropy, token_cross_entropy
from attention.ops import meshes
from attention.ops.cache import Cache

_ROWS = 64  # number of sources decoded together
_END_LABEL = '·'


class Translation:
  """Translation task; encoder and decoder are built from `model_fields`."""

  loss_unit = 'nats per token'
  example_name = 'example translations'

  def __init__(self, config, record: dict, data=None):
    """Create a task; use `create`, or `load` to use a model without data."""
    json = record['vocabulary']
    self.vocabulary = Framed(Bytes() if json is None else Subwords(json))
    self.data = data
    self.max_length = record['max_length']
    self._target_length = record['target_length']
    self._frame_size = record['frame_size']
    self.command = 'evaluate' if self._frame_size else 'translate'
    self._loss = config.loss.to_dict()
    self._drawn = []  # cross-attention patterns for `draw`
    self._has_files = bool(config.data.path)
    if self._has_files:
      sacrebleu()
    self.model_fields = {
      'vocab_size': self.vocabulary.size,
      **config.model.to_dict(),
    }
    self._model = hk.transform(
      lambda *inputs, **more: models.create('translator', **self.model_fields)(
        *inputs, **more
      )
    )

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Translation':
    """Create the task of a config, with its data; `record` is not used."""
    del record
    data = translation.Translations.load(seed=config.seed, **config.data)
    return cls(config, data.record(), data)

  @classmethod
  def load(cls, config, record: dict) -> 'Translation':
    """Create the task from a run's config and data record, without data."""
    return cls(config, record)

  def record(self) -> dict:
    """Return what identifies the data and what using the model requires."""
    return self.data.record()

  def describe(self) -> str:
    data = self.data
    left_out = (
      f' ({data.num_left_out:,} longer than {data.max_length} tokens excluded)'
      if data.num_left_out
      else ''
    )
    return (
      f'{data.name}, {len(data.train.targets):,} pairs{left_out}, '
      f'vocabulary of {data.vocabulary.size:,}, sha256 {data.sha256[:8]}…'
    )

  @property
  def batch_size(self) -> int:
    return translation.ROWS  # divides the rows of all batches

  @property
  def tokens_per_step(self) -> float:
    return self.data.train.tokens_per_batch

  def batch(self, step: int) -> dict[str, np.ndarray]:
    return self.data.train.batch(step)

  def init(self, rng):
    source = np.zeros((1, 2), np.int32)
    if self._frame_size:
      source = np.zeros((1, 2, self._frame_size), np.float32)
    tokens = np.zeros((1, 2), np.int32)
    return self._model.init(rng, source, tokens, np.ones(1, np.int32))

  def _logits(self, params, rng, batch, **more):
    inputs = (batch[name] for name in ('source', 'inputs', 'lengths'))
    return self._model.apply(params, rng, *inputs, **more)

  def loss(self, params, rng, batch):
    """Return the total loss in nats and the token count.

    The loss includes dropout and label smoothing.
    """
    logits = self._logits(params, rng, batch, is_training=True)
    nats = token_cross_entropy(logits, batch['targets'], **self._loss)
    mask = batch['mask']
    return jnp.where(mask, nats, 0).sum(), mask.sum(dtype=jnp.float32)

  def evaluate(self, params, place) -> dict[str, float]:
    """Evaluate the loss and the greedy translations of held-out pairs.

    Args:
      params: model parameters.
      place: function that puts a batch on the devices.

    Returns:
      'eval/loss' in nats per token, without label smoothing. For files,
      'eval/bleu'. For an embedded corpus, 'eval/accuracy', the fraction of
      exact matches, and the same for its other splits, such as
      'eval/accuracy_unseen'.
    """
    held_out = self.data.encode(*self.data.pairs['validation'])
    values = {'eval/loss': self._mean_loss(params, held_out, place)}
    for part, (sources, targets) in self.data.pairs.items():
      if part != 'train':
        answers = self.translate(params, sources, place=place)
        name, figure, _ = self._score(answers, targets)
        suffix = '' if part == 'validation' else f'_{part}'
        values[f'eval/{name}{suffix}'] = figure
    self._drawn = [
      self._cross_attention(params, source) for source, _ in self._held_out(2)
    ]
    return values

  def report(self, params, sources: list, targets: list, beam_size: int):
    """Yield lines of text that report a model's quality on given pairs.

    Args:
      params: model parameters.
      sources: texts, or vectors.
      targets: texts.
      beam_size: see `translate`.

    Yields:
      The loss, then the rate of exact matches, or case-sensitive and
      case-insensitive BLEU with sacrebleu's signature.

    Raises:
      ValueError: as `translate`.
    """
    self._check_beam(beam_size)
    pairs = translation.encode(sources, targets, self.vocabulary)
    loss = self._mean_loss(params, pairs, jax.device_put)
    yield f'loss {loss:.4f} nats per token'
    answers = self.translate(params, sources, beam_size=beam_size)
    name, figure, meaning = self._score(answers, targets)
    yield f'{name} {figure:.4g}  {meaning}, beam {beam_size}'
    if self._has_files:
      bleu = sacrebleu().BLEU(lowercase=True)
      figure = bleu.corpus_score(answers, [targets]).score
      yield f'bleu {figure:.4g}  {bleu.get_signature()}, beam {beam_size}'

  def _mean_loss(self, params, pairs, place):
    total, count = 0.0, 0.0
    for _, batch in pairs.all():
      nats, tokens = self._evaluate_batch(params, place(batch))
      total, count = total + float(nats), count + float(tokens)
    return total / count

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits = self._logits(params, None, batch)
      return cross_entropy(logits, batch['targets'], batch['mask'])

    return evaluate_batch

  def _score(self, answers, targets):
    """Return ('bleu' or 'accuracy', value, description)."""
    if not self._has_files:
      figure = np.mean([a == t for a, t in zip(answers, targets, strict=True)])
      return 'accuracy', float(figure), 'exact matches'
    bleu = sacrebleu().BLEU()
    figure = bleu.corpus_score(answers, [targets]).score
    return 'bleu', figure, str(bleu.get_signature())

  def refusals(self, sources: list) -> dict[int, str]:
    """Return {index: reason} for the sources that cannot be translated."""
    encoded = translation.encode_sources(sources, self.vocabulary)
    return {
      i: f'{len(source)} tokens; the model accepts at most {self.max_length}'
      for i, source in enumerate(encoded)
      if len(source) > self.max_length
    }

  def translate(
    self, params, sources: list, *, beam_size: int = 1, place=None
  ) -> list[str]:
    """Translate sources.

    Args:
      params: model parameters.
      sources: texts, or vectors [k, c]. The translation of an empty source, or
        of one with more than `max_length` tokens, is empty.
      beam_size: beam size; 1 decodes greedily.
      place: called after each batch; it may raise to stop the translation.

    Raises:
      ValueError: `beam_size` is out of range.
    """
    self._check_beam(beam_size)
    answers = [''] * len(sources)
    encoded = translation.encode_sources(sources, self.vocabulary)
    # An empty text is encoded as the end token alone.
    least = 1 if self._frame_size else 2
    numbers = [
      i for i, s in enumerate(encoded) if least <= len(s) <= self.max_length
    ]
    numbers.sort(key=lambda i: len(encoded[i]))
    params = jax.device_put(params, jax.devices()[0])
    for start in range(0, len(numbers), _ROWS):
      part = numbers[start : start + _ROWS]
      batch = _fill([encoded[i] for i in part])
      with meshes.none():
        tokens = self._decode(params, *batch, beam_size=beam_size)
      if place is not None:
        place({})
      for i, row in zip(part, np.asarray(tokens), strict=False):
        answers[i] = self.vocabulary.decode(row)
    return answers

  def lower_decoding(self, params):
    """Lower greedy decoding of a source of half the maximum length.

    Args:
      params: shapes of the model parameters, with shardings.

    Returns:
      The lowered program and the shapes of its cache.
    """
    shape = (max(1, self.max_length // 2),)
    source = np.zeros(shape, np.int32)
    if self._frame_size:
      source = np.zeros((*shape, self._frame_size), np.float32)
    batch = _fill([source])

    def read(params, source, lengths):
      return self._advance(params, *self._begin(source, lengths))[1]

    lowered = self._decode.lower(params, *batch, beam_size=1)
    return lowered, jax.eval_shape(read, params, *batch)

  def _begin(self, source, lengths):
    """Return the first tokens, and a cache that holds only the source."""
    cache = source, lengths, Cache.create(self._target_length)
    return jnp.full((len(source), 1), START), cache

  def _advance(self, params, tokens, cache):
    source, lengths, layers = cache
    logits, layers = self._model.apply(
      params, None, source, tokens, lengths, cache=layers
    )
    return logits[:, -1], (None, lengths, layers)

  @functools.cached_property
  def _decode(self):
    def decode(params, source, lengths, beam_size):
      step = functools.partial(self._advance, params)
      prompt, cache = self._begin(source, lengths)
      count = self._target_length
      if beam_size == 1:
        return decoding.greedy(step, cache, prompt, count, end=END)
      tokens, _ = decoding.beam_search(
        step, cache, prompt, count, end=END, beam_size=beam_size
      )
      return tokens[:, 0]

    return jax.jit(decode, static_argnames='beam_size')

  def _check_beam(self, beam_size):
    if not 1 <= beam_size <= self.vocabulary.size:
      raise ValueError(
        f'beam_size: expected 1 to {self.vocabulary.size}, the size of the '
        f'vocabulary, got {beam_size}'
      )

  def _held_out(self, count):
    """Return the first `count` validation pairs that can be translated."""
    sources, targets = (x[:100] for x in self.data.pairs['validation'])
    refused = self.refusals(sources)
    pairs = list(enumerate(zip(sources, targets, strict=True)))
    return [pair for i, pair in pairs if i not in refused][:count]

  def example(self, params, seed: int) -> str:
    """Format a few held-out sources, their targets and the model's answers."""
    pairs = self._held_out(5)
    answers = self.translate(params, [source for source, _ in pairs])
    lines = []
    for (source, target), answer in zip(pairs, answers, strict=True):
      shown = source if isinstance(source, str) else f'{len(source)} frames'
      lines += [
        f'source  {shown}',
        f'target  {target}',
        f'answer  {answer}',
        '',
      ]
    return '\n'.join(lines)

  def draw(self, folder) -> None:
    """Draw the last evaluation's cross-attention in two held-out sentences."""
    from attention import plots

    for n, (queries, keys, found) in enumerate(self._drawn):
      layer, heads = plots.rows(found)[-1]
      figure = plots.pattern(
        heads.mean(0), queries, keys, title=f'{layer}, mean of all heads'
      )
      figure.savefig(folder / f'cross_attention_{n}.png', dpi=plots.DPI)

  def patterns(self, params, text: str, **selection) -> dict:
    """Capture the cross-attention between a text and its translation.

    Args:
      params: model parameters.
      text: a text of at most `max_length` tokens.
      **selection: layers and heads, see `attention.capture`.

    Returns:
      {'cross_attention': (labels of the answer's tokens, the queries; labels of
      the source's tokens, the keys; patterns by module path)}.

    Raises:
      ValueError: the text is empty or too long, or a layer or head does not
        exist.
    """
    if self._frame_size:
      raise ValueError('text: this model reads vectors, not text')
    if not text:
      raise ValueError('text: expected at least one symbol, got none')
    for reason in self.refusals([text]).values():
      raise ValueError(f'text: {reason}')
    return {'cross_attention': self._cross_attention(params, text, **selection)}

  def _cross_attention(self, params, source, layers=None, heads=None):
    """Return (answer labels, source labels, patterns by module path)."""
    answer = self.translate(params, [source])[0]
    (tokens,) = self.vocabulary.encode([answer])
    (source,) = translation.encode_sources([source], self.vocabulary)
    run = functools.partial(
      capture,
      self._model,
      layers='*cross_attention' if layers is None else layers,
      heads=heads,
    )
    with meshes.none():
      _, found = jax.jit(run)(
        jax.device_put(params, jax.devices()[0]),
        source[None],
        np.append(START, tokens)[None],
        np.array([len(source)]),
      )
    if self._frame_size:
      keys = list(map(str, range(len(source))))
    else:
      keys = [*self.vocabulary.pieces(source), _END_LABEL]
    # Label each query with the token that it predicts.
    return [*self.vocabulary.pieces(tokens), _END_LABEL], keys, found


def _fill(sources):
  """Pad to one of a few shapes; returns (sources, lengths).

  The number of rows is padded to a power of two, and the length to a multiple
  of 16.
  """
  length = -(-max(map(len, sources)) // 16) * 16
  rows = 1 << (len(sources) - 1).bit_length()
  padded, lengths = translation.pad(sources, length)
  # Pad by repeating the first row, so that the padding adds no decoding steps.
  missing = rows - len(sources)
  return (
    np.concatenate([padded, np.repeat(padded[:1], missing, axis=0)]),
    np.concatenate([lengths, np.repeat(lengths[:1], missing)]),
  )


def sacrebleu():
  """Import sacrebleu, which computes BLEU.

  Raises:
    ValueError: sacrebleu is not installed.
  """
  try:
    import sacrebleu
  except ImportError:
    raise ValueError("BLEU needs sacrebleu: pip install -e '.[data]'") from None
  return sacrebleu
