"""From a sequence of one kind to a text: translation, reading tones."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import decoding, models, plots
from attention.capture import capture
from attention.data import translation
from attention.data.subwords import Subwords
from attention.data.vocabularies import END, START, Bytes, Framed
from attention.models.losses import cross_entropy, token_cross_entropy
from attention.ops.cache import Cache

_ROWS = 64  # sources that are decoded at once
_END_LABEL = '·'


class Translation:
  """An encoder and decoder, of `model_fields`, that learn from pairs."""

  loss_unit = 'nats per token'
  example_name = 'a few answers'

  def __init__(self, config, record: dict, data=None):
    """See `create` and `load`; `data` is None where nothing is trained."""
    json = record['vocabulary']
    self.vocabulary = Framed(Bytes() if json is None else Subwords(json))
    self.data = data
    self.max_length = record['max_length']
    self._target_length = record['target_length']
    self._frame_size = record['frame_size']
    self.command = 'evaluate' if self._frame_size else 'translate'
    self._loss = config.loss.to_dict()
    self._drawn = []  # what `draw` draws
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
    """From a config, with its data, whatever was recorded of it before."""
    del record
    data = translation.Translations.load(seed=config.seed, **config.data)
    return cls(config, data.record(), data)

  @classmethod
  def load(cls, config, record: dict) -> 'Translation':
    """From a run's config and data record, without the data."""
    return cls(config, record)

  def record(self) -> dict:
    """What identifies the data, and what is needed to use the model."""
    return self.data.record()

  def describe(self) -> str:
    data = self.data
    left_out = (
      f' ({data.num_left_out:,} longer than {data.max_length} tokens left out)'
      if data.num_left_out
      else ''
    )
    return (
      f'{data.name}, {len(data.train.targets):,} pairs{left_out}, '
      f'{data.vocabulary.size:,} kinds of tokens, sha256 {data.sha256[:8]}…'
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
    """Nats, with dropout and label smoothing, and the number of tokens."""
    logits = self._logits(params, rng, batch, is_training=True)
    nats = token_cross_entropy(logits, batch['targets'], **self._loss)
    mask = batch['mask']
    return jnp.where(mask, nats, 0).sum(), mask.sum(dtype=jnp.float32)

  def evaluate(self, params, place) -> dict[str, float]:
    """Nats per token of what is held out, and how good the answers are.

    Args:
      params: of the model.
      place: puts a batch on the devices.

    Returns:
      'eval/loss', without smoothing; 'eval/bleu' of files, greedily decoded;
      'eval/accuracy' of an embedded corpus, exact answers, and the same of its
      other parts, as 'eval/accuracy_unseen'.
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
    """Lines about how good a model is on pairs.

    Args:
      params: of the model.
      sources: texts, or vectors.
      targets: texts.
      beam_size: see `translate`.

    Yields:
      Loss, then exact matches or BLEU with sacrebleu's signature, cased and
      not.

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
    """('bleu' or 'accuracy', figure, what it means)."""
    if not self._has_files:
      figure = np.mean([a == t for a, t in zip(answers, targets, strict=True)])
      return 'accuracy', float(figure), 'exact matches'
    bleu = sacrebleu().BLEU()
    figure = bleu.corpus_score(answers, [targets]).score
    return 'bleu', figure, str(bleu.get_signature())

  def refusals(self, sources: list) -> dict[int, str]:
    """Why some sources can't be translated, by their number."""
    encoded = translation.encode_sources(sources, self.vocabulary)
    return {
      i: f'{len(source)} tokens; the model reads at most {self.max_length}'
      for i, source in enumerate(encoded)
      if len(source) > self.max_length
    }

  def translate(
    self, params, sources: list, *, beam_size: int = 1, place=None
  ) -> list[str]:
    """The answers to sources.

    Args:
      params: of the model.
      sources: texts, or vectors [k, c]. The answer to an empty one, or one with
        more than `max_length` tokens, is empty.
      beam_size: 1 takes the likeliest token each time.
      place: called now and then, to be stopped in.

    Raises:
      ValueError: a beam that is too large.
    """
    self._check_beam(beam_size)
    answers = [''] * len(sources)
    encoded = translation.encode_sources(sources, self.vocabulary)
    # An empty text is its end alone.
    least = 1 if self._frame_size else 2
    numbers = [
      i for i, s in enumerate(encoded) if least <= len(s) <= self.max_length
    ]
    numbers.sort(key=lambda i: len(encoded[i]))
    params = jax.device_put(params, jax.devices()[0])
    for start in range(0, len(numbers), _ROWS):
      part = numbers[start : start + _ROWS]
      tokens = self._decode(
        params, *_fill([encoded[i] for i in part]), beam_size=beam_size
      )
      if place is not None:
        place({})
      for i, row in zip(part, np.asarray(tokens), strict=False):
        answers[i] = self.vocabulary.decode(row)
    return answers

  def lower_decoding(self, params):
    """What answers a source of half the longest, ready to be compiled.

    Args:
      params: shapes of the model's, with shardings.

    Returns:
      The lowered program, which decodes greedily, and the shapes of the cache
      that it keeps.
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
    """The first tokens, and a cache that holds no more than the source."""
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
    """The first `count` validation pairs that can be translated."""
    sources, targets = (x[:100] for x in self.data.pairs['validation'])
    refused = self.refusals(sources)
    pairs = list(enumerate(zip(sources, targets, strict=True)))
    return [pair for i, pair in pairs if i not in refused][:count]

  def example(self, params, seed: int) -> str:
    """A few held-out sources, their targets and the model's answers."""
    pairs = self._held_out(5)
    answers = self.translate(params, [source for source, _ in pairs])
    lines = []
    for (source, target), answer in zip(pairs, answers, strict=True):
      told = source if isinstance(source, str) else f'{len(source)} frames'
      lines += [f'source  {told}', f'target  {target}', f'answer  {answer}', '']
    return '\n'.join(lines)

  def draw(self, folder) -> None:
    """Cross-attention at the last evaluation, in two held-out sentences."""
    for n, (queries, keys, found) in enumerate(self._drawn):
      layer, heads = plots.rows(found)[-1]
      figure = plots.pattern(
        heads.mean(0), queries, keys, title=f'{layer}, mean of all heads'
      )
      figure.savefig(folder / f'cross_attention_{n}.png', dpi=120)

  def patterns(self, params, text: str, **selection) -> dict:
    """What the model attends to in a text and in the answer it gives.

    Args:
      params: of the model.
      text: up to the model's longest.
      **selection: layers and heads, see `attention.capture`.

    Returns:
      {'cross_attention': (answer as queries, source as keys, patterns by module
      path)}.

    Raises:
      ValueError: a text that is empty or too long; a layer or head that isn't
        there.
    """
    if self._frame_size:
      raise ValueError('text: this model reads vectors, not text')
    if not text:
      raise ValueError('text: expected at least one symbol, got none')
    for reason in self.refusals([text]).values():
      raise ValueError(f'text: {reason}')
    return {'cross_attention': self._cross_attention(params, text, **selection)}

  def _cross_attention(self, params, source, layers=None, heads=None):
    """(labels of the answer, of the source, patterns by module path)."""
    answer = self.translate(params, [source])[0]
    (tokens,) = self.vocabulary.encode([answer])
    (source,) = translation.encode_sources([source], self.vocabulary)
    run = functools.partial(
      capture,
      self._model,
      layers='*cross_attention' if layers is None else layers,
      heads=heads,
    )
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
    # A row is labelled with the token it leads to.
    return [*self.vocabulary.pieces(tokens), _END_LABEL], keys, found


def _fill(sources):
  """A batch of few possible shapes: (sources, lengths).

  Rows are filled up to a power of two, and lengths to a multiple of 16.
  """
  length = -(-max(map(len, sources)) // 16) * 16
  rows = 1 << (len(sources) - 1).bit_length()
  padded, lengths = translation.pad(sources, length)
  # What fills up is the first row again, which ends when that does.
  missing = rows - len(sources)
  return (
    np.concatenate([padded, np.repeat(padded[:1], missing, axis=0)]),
    np.concatenate([lengths, np.repeat(lengths[:1], missing)]),
  )


def sacrebleu():
  """The library that counts BLEU.

  Raises:
    ValueError: it isn't installed.
  """
  try:
    import sacrebleu
  except ImportError:
    raise ValueError("BLEU needs sacrebleu: pip install -e '.[data]'") from None
  return sacrebleu
