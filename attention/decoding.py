"""Autoregressive decoding with any model.

A model is a function `step(tokens, cache) -> (logits, cache)`. It takes the
next tokens [b, t] and returns the logits [b, v] of the token that follows. The
cache is any tree of scalars and of arrays with a leading batch axis. The step
on the prompt may change the structure of the cache; later steps must not.

Each function is a single loop that can be jitted. It stops when every row has
ended. Ended rows are padded with the end token.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def greedy(step, cache, prompt, num_tokens: int, *, end: int | None = None):
  """Decode greedily: choose the most likely token at each step.

  Args:
    step: the model; see the module docstring.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    end: the token that ends a row; None decodes all `num_tokens`.

  Returns:
    Tokens [b, num_tokens] int32, without the prompt.

  Raises:
    ValueError: If the prompt is invalid or `num_tokens` < 1.
  """

  def choose(logits, *_):
    return jnp.argmax(logits, axis=-1)

  return _decode(step, cache, prompt, num_tokens, choose, end)


def sample(
  step,
  cache,
  prompt,
  num_tokens: int,
  rng,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  repetition_penalty: float | None = None,
  end: int | None = None,
):
  """Sample each token from the model's next-token distribution.

  The repetition penalty is applied first, then the other options in the order
  of the arguments.

  Args:
    step: the model; see the module docstring.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    rng: a `jax.random` key.
    temperature: divides the logits; 0 chooses the most likely token.
    top_k: sample from the k most likely tokens; None for all.
    top_p: nucleus sampling: sample from the smallest set of tokens whose
      probabilities sum to at least p (Holtzman et al. 2020).
    min_p: sample from tokens with at least p times the probability of the most
      likely token (Nguyen et al. 2024).
    repetition_penalty: divides the positive logits and multiplies the negative
      logits of tokens that the row already contains (Keskar et al. 2019,
      section 4.1).
    end: the token that ends a row; None decodes all `num_tokens`.

  Returns:
    Tokens [b, num_tokens] int32, without the prompt.

  Raises:
    ValueError: If the prompt is invalid or a number is out of range.
  """
  check_strategy(
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
  )

  def choose(logits, i, present):
    if repetition_penalty is not None:
      logits = _penalise(logits, present, repetition_penalty)
    if temperature == 0:
      return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    for narrow, value in ((_top_k, top_k), (_top_p, top_p), (_min_p, min_p)):
      if value is not None:
        logits = narrow(logits, value)
    return jax.random.categorical(jax.random.fold_in(rng, i), logits)

  return _decode(
    step,
    cache,
    prompt,
    num_tokens,
    choose,
    end,
    tracks_tokens=repetition_penalty is not None,
  )


def check_strategy(**options) -> None:
  """Validate sampling options (temperature, top_k, …); None is always valid.

  Raises:
    ValueError: If a number is out of range or an option is unknown.
  """
  for name, value in options.items():
    if name not in _STRATEGIES:
      raise ValueError(
        f'options: expected names in {sorted(_STRATEGIES)}, got {name!r}'
      )
    is_valid, expected = _STRATEGIES[name]
    if value is not None and not is_valid(value):
      raise ValueError(f'{name}: expected {expected}, got {value}')


_STRATEGIES = {
  'temperature': (lambda x: x >= 0, '0 or more'),
  'top_k': (lambda x: x >= 1, '1 or more'),
  'top_p': (lambda x: 0 < x <= 1, 'above 0, up to 1'),
  'min_p': (lambda x: 0 <= x <= 1, '0 to 1'),
  'repetition_penalty': (lambda x: x > 0, 'above 0'),
}


def _penalise(logits, present, penalty):
  changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(present, changed, logits)


def _top_k(logits, k):
  least = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < least, -jnp.inf, logits)


def _top_p(logits, p):
  ordered = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  least = jnp.where(before < p, ordered, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)


def _min_p(logits, p):
  # A factor p in probability is an offset log p in logits.
  least = logits.max(-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits < least, -jnp.inf, logits)


def _decode(
  step, cache, prompt, num_tokens, choose, end, *, tracks_tokens=False
):
  """Decode with choose(logits, index, present [b, v]) -> next tokens [b]."""
  prompt = _check_prompt(prompt, num_tokens)
  logits, cache = step(prompt, cache)
  rows = jnp.arange(len(prompt))
  present = jnp.zeros((), bool)  # tokens in each row, if tracked
  if tracks_tokens:
    present = jnp.zeros(logits.shape, bool).at[rows[:, None], prompt].set(True)

  def pick(i, logits, present, is_done):
    token = choose(logits, i, present).astype(jnp.int32)
    if end is not None:
      token = jnp.where(is_done, end, token)
      is_done = token == end
    if tracks_tokens:
      present = present.at[rows, token].set(True)
    return token, present, is_done

  def advance(carry):
    i, tokens, cache, token, present, is_done = carry
    logits, cache = step(token[:, None], cache)
    token, present, is_done = pick(i, logits, present, is_done)
    tokens = lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)
    return i + 1, tokens, cache, token, present, is_done

  def is_unfinished(carry):
    i, *_, is_done = carry
    return (i < num_tokens) & ~is_done.all()

  token, present, is_done = pick(
    0, logits, present, jnp.zeros(len(prompt), bool)
  )
  tokens = jnp.full((len(prompt), num_tokens), -1 if end is None else end)
  tokens = tokens.astype(jnp.int32).at[:, 0].set(token)
  carry = (jnp.int32(1), tokens, cache, token, present, is_done)
  return lax.while_loop(is_unfinished, advance, carry)[1]


def beam_search(
  step,
  cache,
  prompt,
  num_tokens: int,
  *,
  end: int,
  beam_size: int = 5,
  num_best: int = 1,
  length_penalty: float = 0.6,
):
  """Decode with beam search.

  A hypothesis is complete when it ends while it is among the `beam_size` most
  likely candidates of its row. A row has ended when it has `beam_size` complete
  hypotheses. With one beam this is `greedy`.

  Args:
    step: the model; see the module docstring. It is called on the prompt, then
      on b · beam_size rows.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    end: the token that ends a row.
    beam_size: hypotheses per row, at most the vocabulary size.
    num_best: the number of hypotheses to return.
    length_penalty: α of Wu et al. 2016, equation 14. Scores are
      log-probabilities divided by ((5 + length) / 6)^α, where the length
      includes the end token.

  Returns:
    tokens [b, num_best, num_tokens] int32, best first, and their scores [b,
    num_best] float32. Hypotheses without an end token come last.

  Raises:
    ValueError: If the prompt is invalid or a number is out of range.
  """
  prompt = _check_prompt(prompt, num_tokens)
  num_rows = len(prompt)
  logits, cache = step(prompt, cache)
  vocab_size = logits.shape[-1]
  if not 1 <= beam_size <= vocab_size:
    raise ValueError(
      f'beam_size: expected 1 to {vocab_size}, the vocabulary size, '
      f'got {beam_size}'
    )
  if not 1 <= num_best <= beam_size:
    raise ValueError(
      f'num_best: expected 1 to beam_size={beam_size}, got {num_best}'
    )
  search = functools.partial(
    _advance_beams, end=end, length_penalty=length_penalty
  )
  shape = (num_rows, beam_size)
  tokens = jnp.full((*shape, num_tokens), end, jnp.int32)
  # All beams are identical at first, so only one of them is alive.
  scores = jnp.broadcast_to(jnp.arange(beam_size) == 0, shape)
  alive = tokens, jnp.where(scores, 0.0, -jnp.inf)
  complete = tokens, jnp.full(shape, -jnp.inf)
  cache = _map_batched(lambda x: jnp.repeat(x, beam_size, axis=0), cache)
  logits = jnp.repeat(logits, beam_size, axis=0)
  parents, alive, complete = search(0, logits, alive, complete)

  def advance(carry):
    i, cache, parents, alive, complete = carry
    cache = _map_batched(lambda x: x[parents], cache)
    last = lax.dynamic_index_in_dim(alive[0], i - 1, 2, keepdims=False)
    logits, cache = step(last.reshape(-1, 1), cache)
    parents, alive, complete = search(i, logits, alive, complete)
    return i + 1, cache, parents, alive, complete

  def is_unfinished(carry):
    i, *_, (_, scores) = carry
    return (i < num_tokens) & jnp.isneginf(scores).any()

  carry = (jnp.int32(1), cache, parents, alive, complete)
  *_, alive, complete = lax.while_loop(is_unfinished, advance, carry)
  # Unfinished hypotheses fill the slots without a complete one.
  tokens = jnp.concatenate([complete[0], alive[0]], axis=1)
  unfinished = alive[1] / _normaliser(num_tokens, length_penalty)
  scores = jnp.concatenate([complete[1], unfinished], axis=1)
  is_alive = jnp.arange(2 * beam_size) >= beam_size
  order = jnp.lexsort((-scores, is_alive | jnp.isneginf(scores)))
  best = order[:, :num_best]
  return (
    jnp.take_along_axis(tokens, best[..., None], axis=1),
    jnp.take_along_axis(scores, best, axis=1),
  )


def _advance_beams(i, logits, alive, complete, *, end, length_penalty):
  """Extend each beam by one token.

  Args:
    i: index of the new token.
    logits: [b · n, v] of the beams that are alive.
    alive: tokens [b, n, t] and their log-probabilities [b, n].
    complete: tokens [b, n, t] and normalised scores [b, n].
    end: the token that completes a hypothesis.
    length_penalty: see `beam_search`.

  Returns:
    parents [b · n], the row that each new beam extends, and the new `alive` and
    `complete`.
  """
  tokens, scores = alive
  num_rows, beam_size, _ = tokens.shape
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  vocab_size = log_probs.shape[-1]
  sums = scores[..., None] + log_probs.reshape(num_rows, beam_size, vocab_size)
  # At most n of the 2 n best candidates end, so n others can continue.
  count = min(2 * beam_size, beam_size * vocab_size)
  sums, at = lax.top_k(sums.reshape(num_rows, -1), count)
  parents, token = at // vocab_size, (at % vocab_size).astype(jnp.int32)
  written = jnp.take_along_axis(tokens, parents[..., None], axis=1)
  written = lax.dynamic_update_index_in_dim(written, token, i, axis=2)

  is_end = token == end
  is_best = jnp.arange(count) < beam_size
  # A row with n complete hypotheses no longer changes them.
  is_open = jnp.isneginf(complete[1]).any(-1, keepdims=True)
  ended = sums / _normaliser(i + 1, length_penalty)
  ended = jnp.where(is_end & is_best & is_open, ended, -jnp.inf)
  complete = _take_best(
    beam_size,
    jnp.concatenate([complete[1], ended], axis=1),
    jnp.concatenate([complete[0], written], axis=1),
  )
  unfinished = jnp.where(is_end, -jnp.inf, sums)
  *alive, parents = _take_best(beam_size, unfinished, written, parents)
  rows = jnp.arange(num_rows)[:, None] * beam_size
  return (rows + parents).reshape(-1), tuple(alive), complete


def _take_best(count, scores, tokens, *others):
  """The best `count` along axis 1: (tokens, scores, *others)."""
  scores, at = lax.top_k(scores, count)
  taken = [jnp.take_along_axis(x, at, axis=1) for x in others]
  return jnp.take_along_axis(tokens, at[..., None], axis=1), scores, *taken


def _normaliser(length, alpha):
  return ((5 + length) / 6) ** alpha


def _map_batched(function, cache):
  """Apply `function` to the leaves with a batch axis, not to scalars."""
  return jax.tree.map(lambda x: function(x) if jnp.ndim(x) else x, cache)


def _check_prompt(prompt, num_tokens):
  """Validate the prompt and return it as int32, like all new tokens."""
  prompt = jnp.asarray(prompt)
  if prompt.ndim != 2:
    raise ValueError(f'prompt: expected [b, t], got shape {prompt.shape}')
  if prompt.shape[1] == 0:
    raise ValueError('prompt: expected at least one token, got none')
  if not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise ValueError(f'prompt: expected ints, got {prompt.dtype}')
  if num_tokens < 1:
    raise ValueError(f'num_tokens: expected 1 or more, got {num_tokens}')
  return prompt.astype(jnp.int32)
