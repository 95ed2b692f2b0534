"""Next-token prediction on a text."""

import functools

import haiku as hk
import jax
import numpy as np

from attention import decoding, models
from attention.capture import capture
from attention.data import language
from attention.models.gpt import window_step
from attention.models.losses import cross_entropy


class Language:
  """A GPT that learns to continue a text."""

  def __init__(self, vocabulary, model: dict, data: language.Text | None):
    """See `create` and `load`; `data` is None where nothing is trained."""
    self.vocabulary = vocabulary
    self.data = data
    self.context_size = model['context_size']
    model = {'vocab_size': vocabulary.size, **model}
    if model['vocab_size'] < vocabulary.size:
      raise ValueError(
        f'model.vocab_size: expected at least {vocabulary.size}, as the data '
        f'has, got {model["vocab_size"]}'
      )
    forward = functools.partial(models.create, 'gpt', **model)
    self._model = hk.transform(
      lambda tokens, is_training=False: forward()(
        tokens, is_training=is_training
      )
    )

  @classmethod
  def create(cls, config) -> 'Language':
    """From a config, with its data."""
    data = language.Text.load(seed=config.seed, **config.data)
    if config.model.context_size < data.context_size:
      raise ValueError(
        f'model.context_size: expected at least data.context_size='
        f'{data.context_size}, got {config.model.context_size}'
      )
    return cls(data.vocabulary, config.model.to_dict(), data)

  @classmethod
  def load(cls, config, record: dict) -> 'Language':
    """From a run's config and data record, without the data."""
    symbols = record['vocabulary']
    vocabulary = (
      language.Bytes() if symbols is None else language.Characters(symbols)
    )
    return cls(vocabulary, config.model.to_dict(), None)

  def record(self) -> dict:
    """What identifies the data, and what is needed to use the model."""
    return {
      'sha256': self.data.sha256,
      'vocabulary': getattr(self.vocabulary, 'symbols', None),
    }

  def describe(self) -> str:
    data = self.data
    return (
      f'{data.name}, {len(data.tokens):,} tokens of {self.vocabulary.size} '
      f'kinds, sha256 {data.sha256[:8]}…'
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
    """Logits [b, t, v] of the tokens after [b, t]."""
    return self._model.apply(params, None, tokens)

  def loss(self, params, rng, batch):
    """Nats, with dropout, and the number of tokens."""
    logits = self._model.apply(params, rng, batch['tokens'], True)
    return cross_entropy(logits, batch['targets'])

  def evaluate(self, params, place) -> dict[str, float]:
    """Mean nats per token over the whole validation part.

    Args:
      params: of the model.
      place: puts a batch on the devices.
    """
    total, count = 0.0, 0.0
    for batch in self.data.validation_batches(4 * self.batch_size):
      nats, tokens = self._evaluate_batch(params, place(batch))
      total, count = total + float(nats), count + float(tokens)
    return {'eval/loss': total / count}

  @functools.cached_property
  def _evaluate_batch(self):
    @jax.jit
    def evaluate_batch(params, batch):
      logits = self.apply(params, batch['tokens'])
      return cross_entropy(logits, batch['targets'], batch['mask'])

    return evaluate_batch

  def example(self, params, seed: int) -> str:
    """A text that shows what the model has learnt so far."""
    return self.sample(params, '\n', 200, seed=seed, temperature=0.8)

  def sample(
    self,
    params,
    prompt: str,
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
  ) -> str:
    """The prompt and what the model writes after it.

    Raises:
      ValueError: an empty prompt, or symbols that the model has never seen.
    """
    if num_tokens < 1:
      raise ValueError(f'num_tokens: expected 1 or more, got {num_tokens}')
    tokens = self._encode('prompt', prompt)
    drawn = self._sample(
      params,
      tokens[:, -self.context_size :],
      jax.random.key(seed),
      num_tokens=num_tokens,
      temperature=temperature,
      top_k=top_k,
    )
    return prompt + self.vocabulary.decode(np.asarray(drawn)[0])

  def patterns(self, params, text: str, **selection) -> dict:
    """What the model attends to in a text.

    Args:
      params: of the model.
      text: up to the model's context.
      **selection: layers and heads, see `attention.capture`.

    Returns:
      {'attention': (tokens as queries, as keys, patterns by module path)}.

    Raises:
      ValueError: a text that is empty, too long or of unknown symbols; a layer
        or head that isn't there.
    """
    tokens = self._encode('text', text)
    if tokens.shape[1] > self.context_size:
      raise ValueError(
        f'text: expected at most {self.context_size} tokens '
        f"(the model's context_size), got {tokens.shape[1]}"
      )
    run = jax.jit(functools.partial(capture, self._model, **selection))
    _, found = run(params, tokens)
    labels = [self.vocabulary.decode([token]) for token in tokens[0]]
    return {'attention': (labels, labels, found)}

  def _encode(self, name, text):
    if not text:
      raise ValueError(f'{name}: expected at least one symbol, got none')
    try:
      return self.vocabulary.encode(text)[None]
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None

  @functools.cached_property
  def _sample(self):
    def sample(params, tokens, rng, **options):
      step, cache = window_step(self.apply, params, self.context_size)
      return decoding.sample(step, cache, tokens, rng=rng, **options)

    return jax.jit(
      sample, static_argnames=('num_tokens', 'temperature', 'top_k')
    )
