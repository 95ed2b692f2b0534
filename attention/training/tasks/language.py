"""Language modelling: next-token prediction on a text."""

import functools
import math

import haiku as hk
import jax
import numpy as np

from attention import decoding, models
from attention.capture import capture
from attention.data import language
from attention.models.losses import cross_entropy
from attention.training.tasks import study
from attention.training.tasks.generation import Draft, Generator, Written


class Language:
  """Language-modelling task; the GPT is built from `model_fields`."""

  command = 'sample'
  loss_unit = 'nats per token'
  example_name = 'a sample'
  prefix: tuple[int, ...] = ()  # tokens that texts start with
  end: int | tuple[int, ...] | None = None  # the tokens that end a text

  def __init__(
    self, vocabulary, model: dict, data: language.Text | None, parts: int = 1
  ):
    """Create a task; `create` and `load` do so from a config.

    Args:
      vocabulary: encodes and decodes the texts; None to count parameters.
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
    if vocabulary is not None and model['vocab_size'] < vocabulary.size:
      raise ValueError(
        f'model.vocab_size: expected at least {vocabulary.size}, the size of '
        f"the data's vocabulary, got {model['vocab_size']}"
      )
    self.has_cache = model.get('mixer', 'attention') == 'attention'
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

  def evaluate_text(
    self, params, text: str, context_size: int = 0
  ) -> dict[str, float]:
    """Evaluate the model on a text, with a sliding context.

    Each token is predicted once, from half a context or more, as far as the
    text goes back. The first one counts only if texts have a prefix.

    Args:
      params: model parameters.
      text: any text.
      context_size: tokens of context; 0 for the model's, up to 1,024.

    Returns:
      'loss' in nats per token, 'bits_per_byte' of UTF-8, 'tokens' and 'bytes',
      of what is predicted.

    Raises:
      ValueError: a text of too few tokens or with symbols outside the
        vocabulary, or a context that the model does not have.
    """
    most = self.context_size
    width = context_size or min(most, 1024)
    if not 2 <= width <= most:
      raise ValueError(
        f"context_size: expected 2 to {most}, the model's, got {width}"
      )
    tokens = self.encode('text', text)[0]
    if len(tokens) < 2:
      raise ValueError('text: expected two tokens or more, got one')
    total, count = 0.0, 0.0
    for batch in language.sliding_batches(
      tokens, width, self._eval_rows(width), num_prefix=len(self.prefix)
    ):
      nats, scored = self._evaluate_batch(params, jax.device_put(batch))
      total, count = total + float(nats), count + float(scored)
    first = 0 if self.prefix else 1
    kept = self.vocabulary.decode(tokens[len(self.prefix) + first :])
    size = len(kept.encode())
    return {
      'loss': total / count,
      'bits_per_byte': total / math.log(2) / size,
      'tokens': count,
      'bytes': size,
    }

  def _eval_rows(self, width):
    """Rows whose logits take about 256 MiB."""
    return max(1, 2**26 // (width * self.model_fields['vocab_size']))

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits = self.apply(params, batch['tokens'])
      return cross_entropy(logits, batch['targets'], batch['mask'])

    return evaluate_batch

  def example(self, params, seed: int) -> str:
    """Sample a text that shows what the model has learnt so far."""
    return self.sample(
      params, self.default_prompt, 200, seed=seed, temperature=0.8
    )

  @property
  def default_prompt(self) -> str:
    """A line break, or the first symbol of a vocabulary without one."""
    symbols = getattr(self.vocabulary, 'symbols', '\n')
    return '\n' if '\n' in symbols else symbols[0]

  def sample(
    self, params, prompt: str, num_tokens: int, *, seed: int, **options
  ) -> str:
    """Return the prompt and its sampled continuation; see `stream`."""
    return ''.join(
      self.stream(params, prompt, num_tokens, seed=seed, **options)
    )

  def stream(
    self,
    params,
    prompt: str,
    num_tokens: int,
    *,
    seed: int,
    stop: tuple[str, ...] = (),
    draft: Draft | None = None,
    **options,
  ):
    """Yield the prompt, then its continuation as it is sampled.

    Tokens are generated in pieces. The model's cache is kept from one to the
    next as long as the text fits into the context; then each piece follows the
    preceding tokens that fit.

    Args:
      params: model parameters.
      prompt: text to continue.
      num_tokens: number of tokens to generate.
      seed: random seed for sampling.
      stop: strings that the text ends before; it also ends at `end`.
      draft: a small model that proposes tokens, from its `as_draft`.
      **options: temperature, top_k, …: see `attention.decoding.sample`.

    Yields:
      Pieces of text, the prompt first.

    Raises:
      ValueError: the prompt is empty or has symbols outside the vocabulary, or
        an option is out of range.
    """
    (tokens,), pieces = self._continue(
      params, {'prompt': prompt}, num_tokens, seed, stop, draft, options
    )
    text = Written(self.vocabulary.decode, tokens, stop, self.end)
    yield prompt
    for piece, is_last in pieces:
      if new := text.add(piece[0], is_last):
        yield new
      if text.is_done:
        return

  def continue_batch(
    self,
    params,
    prompts: list[str],
    num_tokens: int,
    *,
    seed: int,
    stop: tuple[str, ...] = (),
    draft: Draft | None = None,
    **options,
  ) -> list[str]:
    """Return the continuation of each prompt, without the prompt.

    The prompts are padded to the length of the longest. With temperature 0,
    each continuation is that of the prompt alone.

    Args:
      params: model parameters.
      prompts: texts to continue.
      num_tokens: number of tokens to generate for each.
      seed: see `stream`.
      stop: see `stream`.
      draft: see `stream`.
      **options: see `stream`.

    Raises:
      ValueError: as `stream`.
    """
    named = {f'prompts[{i}]': prompt for i, prompt in enumerate(prompts)}
    if not self.has_cache and len(prompts) > 1:
      # Their rows have one length.
      return [
        text
        for prompt in prompts
        for text in self.continue_batch(
          params, [prompt], num_tokens, seed=seed, stop=stop, **options
        )
      ]
    rows, pieces = self._continue(
      params, named, num_tokens, seed, stop, draft, options
    )
    texts = [
      Written(self.vocabulary.decode, tokens, stop, self.end) for tokens in rows
    ]
    found = [''] * len(rows)
    for piece, is_last in pieces:
      for i, tokens in enumerate(piece):
        found[i] += texts[i].add(tokens, is_last)
      if all(text.is_done for text in texts):
        break
    return found

  def as_draft(self, params, num_draft: int = 4) -> Draft:
    """Return this model as the draft of a larger one, for its `stream`.

    Args:
      params: model parameters.
      num_draft: see `attention.decoding.speculative`.
    """
    return Draft(self._generator, params, self.vocabulary, num_draft)

  def _continue(self, params, prompts, num_tokens, seed, stop, draft, options):
    """Check the arguments of `stream`; returns rows of tokens, and pieces.

    The pieces are pairs of tokens [b, n] and whether they are the last.
    """
    if num_tokens < 1:
      raise ValueError(f'num_tokens: expected 1 or more, got {num_tokens}')
    if '' in stop:
      raise ValueError("stop: expected at least one symbol, got ''")
    decoding.check_strategy(**options)
    if draft is not None:
      self._check_draft(draft, options.pop('repetition_penalty', None))
    rows = [self.encode(*item)[0].tolist() for item in prompts.items()]
    pieces = self._generator.pieces(
      params,
      rows,
      num_tokens,
      jax.random.key(seed),
      draft=draft,
      end=self.end,
      **options,
    )

    def cut():
      left = num_tokens
      for piece in pieces:
        yield piece[:, :left], left <= piece.shape[1]
        left -= piece.shape[1]

    return rows, cut()

  def _check_draft(self, draft, penalty):
    if draft.vocabulary != self.vocabulary:
      raise ValueError(
        f'draft: expected the same vocabulary of {self.vocabulary.size} '
        f'tokens, got another, of {draft.vocabulary.size}'
      )
    if not (self._generator.has_cache and draft.generator.has_cache):
      raise ValueError("draft: expected mixer='attention' in both models")
    if penalty is not None:
      raise ValueError(
        f'repetition_penalty: expected None with a draft, got {penalty}'
      )

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
    tokens = self.encode('text', text)
    self._check_length(tokens)
    run = jax.jit(functools.partial(capture, self._model, **selection))
    _, found = run(params, tokens)
    labels = self.vocabulary.pieces(tokens[0])
    return {'attention': (labels, labels, found)}

  def study(self, params, tokens) -> study.Study:
    """Measure what each head and layer does with a text.

    Args:
      params: model parameters.
      tokens: [1, t], from `encode` or `study.repeated_tokens`.

    Raises:
      ValueError: the text is too long, or the model has no attention.
    """
    self._check_length(tokens)
    return study.Study.of(
      self._measure(params, tokens), self.vocabulary.pieces, tokens
    )

  @functools.cached_property
  def _measure(self):
    fields, size = self.model_fields, self.vocabulary.size
    return jax.jit(functools.partial(study.measure, self._model, fields, size))

  def _check_length(self, tokens):
    if tokens.shape[1] > self.context_size:
      raise ValueError(
        f'text: expected at most {self.context_size} tokens '
        f"(the model's context_size), got {tokens.shape[1]}"
      )

  def encode(self, name: str, text: str) -> np.ndarray:
    """Encode a text as tokens [1, t], with the prefix; `name` is for errors.

    Raises:
      ValueError: the text is empty or has symbols outside the vocabulary.
    """
    if not text:
      raise ValueError(f'{name}: expected at least one symbol, got none')
    try:
      tokens = self.vocabulary.encode(text)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None
    return np.concatenate([np.array(self.prefix, np.int32), tokens])[None]

  def lower_decoding(self, params):
    """Lower reading half a context and sampling a piece, as one program.

    Args:
      params: shapes of the model parameters, with shardings.

    Returns:
      The lowered program and the shapes of its cache.
    """
    return self._generator.lower(params)

  @functools.cached_property
  def _generator(self):
    def apply(params, tokens, **more):
      return self._model.apply(params, None, tokens, **more)

    return Generator(
      apply,
      vocab_size=self.vocabulary.size,
      context_size=self.context_size,
      has_cache=self.has_cache,
    )
