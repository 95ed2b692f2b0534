"""Language modelling: next-token prediction on a text."""

import functools
import math

import haiku as hk
import jax
import numpy as np

from attention import decoding, models
from attention.capture import capture
from attention.data import language
from attention.models.gpt import window_step
from attention.models.losses import cross_entropy
from attention.ops.cache import Cache, align

_PIECE = 16  # number of tokens a stream generates at a time


class Language:
  """Language-modelling task; the GPT is built from `model_fields`."""

  command = 'sample'
  loss_unit = 'nats per token'
  example_name = 'a sample'

  def __init__(
    self, vocabulary, model: dict, data: language.Text | None, parts: int = 1
  ):
    """Create a task; `create` and `load` do so from a config.

    Args:
      vocabulary: encodes and decodes the texts.
      model: fields of a GPT; a missing or zero vocab_size defaults to the
        vocabulary's size.
      data: training data; None to use a trained model without data.
      parts: number of micro-batches per training batch.
    """
    self.vocabulary = vocabulary
    self.data = data
    self.context_size = model['context_size']
    size = model.get('vocab_size') or vocabulary.size
    self.model_fields = model = {**model, 'vocab_size': size}
    self._parts = parts
    if model['vocab_size'] < vocabulary.size:
      raise ValueError(
        f'model.vocab_size: expected at least {vocabulary.size}, the size of '
        f"the data's vocabulary, got {model['vocab_size']}"
      )
    self._has_cache = model.get('mixer', 'attention') == 'attention'
    forward = functools.partial(models.create, 'gpt', **model)
    self._model = hk.transform(lambda tokens, **more: forward()(tokens, **more))

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Language':
    """Create the task of a config, with its data.

    Args:
      config: the run's config.
      record: the data record of a run to resume.
    """
    data = language.Text.load(seed=config.seed, record=record, **config.data)
    if config.model.context_size < data.context_size:
      raise ValueError(
        f'model.context_size: expected at least data.context_size='
        f'{data.context_size}, got {config.model.context_size}'
      )
    parts = config.training.get('num_microbatches', 1)
    return cls(data.vocabulary, config.model.to_dict(), data, parts)

  @classmethod
  def load(cls, config, record: dict) -> 'Language':
    """Create the task from a run's config and data record, without data."""
    level = config.data.get('level', 'characters')
    vocabulary = language.recorded(level, record['vocabulary'])
    return cls(vocabulary, config.model.to_dict(), None)

  def record(self) -> dict:
    """Return what identifies the data and what using the model requires."""
    return {'sha256': self.data.sha256, 'vocabulary': self.vocabulary.record}

  def describe(self) -> str:
    data = self.data
    return (
      f'{data.name}, {len(data.tokens):,} tokens, vocabulary of '
      f'{self.vocabulary.size:,}, sha256 {data.sha256[:8]}…'
    )

  @property
  def batch_size(self) -> int:
    return self.data.batch_size

  @property
  def tokens_per_step(self) -> int:
    return self.data.batch_size * self.data.context_size

  def batch(self, step: int) -> dict[str, np.ndarray]:
    return self.data.batch(step)

  def init(self, rng):
    tokens = np.zeros((1, self.context_size), np.int32)
    return self._model.init(rng, tokens)

  def apply(self, params, tokens):
    """Return next-token logits [b, t, v] for tokens [b, t]."""
    return self._model.apply(params, None, tokens)

  def loss(self, params, rng, batch):
    """Return the total loss in nats, with dropout, and the token count."""
    logits = self._model.apply(params, rng, batch['tokens'], is_training=True)
    return cross_entropy(logits, batch['targets'])

  def evaluate(self, params, place) -> dict[str, float]:
    """Evaluate the model on the whole validation split.

    Args:
      params: model parameters.
      place: function that puts a batch on the devices.

    Returns:
      'eval/loss' in nats per token, and 'eval/bits_per_byte' of UTF-8, which is
      comparable between models with different vocabularies.
    """
    total, count = 0.0, 0.0
    # Without gradients, four times as many rows fit.
    rows = 4 * self.batch_size // self._parts
    for batch in self.data.validation_batches(rows):
      nats, tokens = self._evaluate_batch(params, place(batch))
      total, count = total + float(nats), count + float(tokens)
    bits = total / math.log(2)
    return {
      'eval/loss': total / count,
      'eval/bits_per_byte': bits / self.data.validation_bytes,
    }

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits = self.apply(params, batch['tokens'])
      return cross_entropy(logits, batch['targets'], batch['mask'])

    return evaluate_batch

  def example(self, params, seed: int) -> str:
    """Sample a text that shows what the model has learnt so far."""
    return self.sample(params, '\n', 200, seed=seed, temperature=0.8)

  def sample(
    self, params, prompt: str, num_tokens: int, *, seed: int, **options
  ) -> str:
    """Return the prompt and its sampled continuation; see `stream`."""
    return ''.join(
      self.stream(params, prompt, num_tokens, seed=seed, **options)
    )

  def stream(
    self, params, prompt: str, num_tokens: int, *, seed: int, **options
  ):
    """Yield the prompt, then its continuation as it is sampled.

    Tokens are generated in pieces. For each piece, the cache is filled with the
    preceding tokens that fit into the model's context.

    Args:
      params: model parameters.
      prompt: text to continue.
      num_tokens: number of tokens to generate.
      seed: random seed for sampling.
      **options: temperature, top_k, …: see `attention.decoding.sample`.

    Yields:
      Pieces of text, the prompt first.

    Raises:
      ValueError: the prompt is empty or has symbols outside the vocabulary, or
        an option is out of range.
    """
    if num_tokens < 1:
      raise ValueError(f'num_tokens: expected 1 or more, got {num_tokens}')
    tokens = self._encode('prompt', prompt)[0].tolist()
    size = self._piece_size
    rng = jax.random.key(seed)
    options = {k: v for k, v in options.items() if v is not None}
    decoding.check_strategy(**options)
    yield prompt
    drawn, num_yielded = [], len(prompt)
    while len(drawn) < num_tokens:
      before = (tokens + drawn)[-(self.context_size - size + 1) :]
      length = self._padded_length(len(before))
      piece = self._sample(
        params,
        *align([before], length),
        jax.random.fold_in(rng, len(drawn)),
        num_tokens=size,
        **options,
      )
      drawn += np.asarray(piece)[0].tolist()
      # Decode with the prompt: some tokenizers drop a leading space.
      text = self.vocabulary.decode(tokens + drawn[:num_tokens])
      if len(drawn) < num_tokens:
        text = text.rstrip('\ufffd')  # an incomplete symbol
      yield text[num_yielded:]
      num_yielded = max(num_yielded, len(text))

  def patterns(self, params, text: str, **selection) -> dict:
    """Capture the attention patterns in a text.

    Args:
      params: model parameters.
      text: a text that fits into the model's context.
      **selection: layers and heads, see `attention.capture`.

    Returns:
      {'attention': (query labels, key labels, patterns by module path)}.

    Raises:
      ValueError: the text is empty, too long or has symbols outside the
        vocabulary, or a layer or head does not exist.
    """
    tokens = self._encode('text', text)
    if tokens.shape[1] > self.context_size:
      raise ValueError(
        f'text: expected at most {self.context_size} tokens '
        f"(the model's context_size), got {tokens.shape[1]}"
      )
    run = jax.jit(functools.partial(capture, self._model, **selection))
    _, found = run(params, tokens)
    labels = self.vocabulary.pieces(tokens[0])
    return {'attention': (labels, labels, found)}

  def _encode(self, name, text):
    if not text:
      raise ValueError(f'{name}: expected at least one symbol, got none')
    try:
      return self.vocabulary.encode(text)[None]
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None

  def lower_decoding(self, params):
    """Lower the program that `stream` runs after half a context.

    Args:
      params: shapes of the model parameters, with shardings.

    Returns:
      The lowered program and the shapes of its cache.
    """
    length = self._padded_length(max(1, self.context_size // 2))
    prompt = np.zeros((1, length), np.int32), np.zeros(1, np.int32)
    size = self._piece_size

    def read(params, tokens, start):
      step, cache = self._begin(params, tokens, start, size)
      return step(tokens, cache)[1]

    rng = jax.eval_shape(jax.random.key, 0)
    lowered = self._sample.lower(params, *prompt, rng, num_tokens=size)
    return lowered, jax.eval_shape(read, params, *prompt)

  @property
  def _piece_size(self):
    return max(1, min(_PIECE, self.context_size // 4))

  def _padded_length(self, length):
    """Round up to one of a few lengths, so that few programs are compiled."""
    power = 1 << (length - 1).bit_length()
    return min(power, self.context_size - self._piece_size + 1)

  def _begin(self, params, prompt, start, num_tokens):
    """Return (step, cache) for `attention.decoding` to continue a prompt."""
    if self._has_cache:

      def step(tokens, cache):
        logits, cache = self._model.apply(params, None, tokens, cache=cache)
        return logits[:, -1], cache

      # The last generated token is not fed back.
      cache = Cache.create(prompt.shape[1] + num_tokens - 1, start)
    else:
      step, cache = window_step(self.apply, params, self.context_size, start[0])

    def step_in_vocabulary(tokens, cache):
      # The model may have more logits than the vocabulary has tokens.
      logits, cache = step(tokens, cache)
      return logits[:, : self.vocabulary.size], cache

    return step_in_vocabulary, cache

  @functools.cached_property
  def _sample(self):
    def sample(params, tokens, start, rng, num_tokens, **options):
      step, cache = self._begin(params, tokens, start, num_tokens)
      return decoding.sample(step, cache, tokens, num_tokens, rng, **options)

    return jax.jit(
      sample,
      static_argnames=(
        'num_tokens',
        'temperature',
        'top_k',
        'top_p',
        'min_p',
        'repetition_penalty',
      ),
    )
