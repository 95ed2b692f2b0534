"""Writing tokens one after another, with any model.

A model is a function `step(tokens, cache) -> (logits, cache)`: it takes the
tokens [b, t] that come next and gives the logits [b, v] of the token after
them. The cache is whatever it needs to remember: a tree of arrays whose first
axis is the batch, or that are scalars. The step on the prompt may change the
cache's structure; later ones keep it.

Each function is one loop that `jax.jit` takes whole. It stops when every row
has ended; what a row holds behind its end is the end again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def greedy(step, cache, prompt, num_tokens: int, *, end: int | None = None):
  """Takes the likeliest token each time.

  Args:
    step: see above.
    cache: what `step` starts with.
    prompt: [b, t] tokens to begin from, t > 0.
    num_tokens: how many to write, at most.
    end: the token that ends a row; None writes all.

  Returns:
    [b, num_tokens] int32, without the prompt.

  Raises:
    ValueError: an unfit prompt, or num_tokens < 1.
  """

  def choose(logits, *_):
    return jnp.argmax(logits, axis=-1)

  return _write(step, cache, prompt, num_tokens, choose, end)


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
  """Draws each token from the model's distribution given those before it.

  What narrows the distribution is applied in the order of the arguments here,
  the penalty first.

  Args:
    step: see above.
    cache: what `step` starts with.
    prompt: [b, t] tokens to begin from, t > 0.
    num_tokens: how many to draw, at most.
    rng: a key of `jax.random`.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among the k likeliest only; None for all.
    top_p: draw among the fewest whose probabilities reach p together (Holtzman
      et al. 2020).
    min_p: draw among those with at least p times the likeliest's probability
      (Nguyen et al. 2024).
    repetition_penalty: divides positive logits of tokens that a row holds
      already, and multiplies negative ones (Keskar et al. 2019, section 4.1).
    end: the token that ends a row; None writes all.

  Returns:
    [b, num_tokens] int32, without the prompt.

  Raises:
    ValueError: an unfit prompt, or numbers out of range.
  """
  check_strategy(
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
  )

  def choose(logits, i, held):
    if repetition_penalty is not None:
      logits = _penalise(logits, held, repetition_penalty)
    if temperature == 0:
      return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    for narrow, value in ((_top_k, top_k), (_top_p, top_p), (_min_p, min_p)):
      if value is not None:
        logits = narrow(logits, value)
    return jax.random.categorical(jax.random.fold_in(rng, i), logits)

  return _write(
    step,
    cache,
    prompt,
    num_tokens,
    choose,
    end,
    is_holding=repetition_penalty is not None,
  )


def check_strategy(**options) -> None:
  """Checks what `sample` draws by: temperature, top_k, …; None: not at all.

  Raises:
    ValueError: a number out of range, or an option that isn't there.
  """
  for name, value in options.items():
    if name not in _STRATEGIES:
      raise ValueError(f'{name}: expected one of {sorted(_STRATEGIES)}')
    is_right, expected = _STRATEGIES[name]
    if value is not None and not is_right(value):
      raise ValueError(f'{name}: expected {expected}, got {value}')


_STRATEGIES = {
  'temperature': (lambda x: x >= 0, '0 or more'),
  'top_k': (lambda x: x >= 1, '1 or more'),
  'top_p': (lambda x: 0 < x <= 1, 'above 0, up to 1'),
  'min_p': (lambda x: 0 <= x <= 1, '0 to 1'),
  'repetition_penalty': (lambda x: x > 0, 'above 0'),
}


def _penalise(logits, held, penalty):
  changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(held, changed, logits)


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
  # p times the likeliest's probability is log p from its logit.
  least = logits.max(-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits < least, -jnp.inf, logits)


def _write(step, cache, prompt, num_tokens, choose, end, *, is_holding=False):
  """The loop: choose(logits, number, held [b, v]) gives the next tokens [b]."""
  prompt = _check(prompt, num_tokens)
  logits, cache = step(prompt, cache)
  rows = jnp.arange(len(prompt))
  held = jnp.zeros((), bool)  # which tokens a row holds, if asked for
  if is_holding:
    held = jnp.zeros(logits.shape, bool).at[rows[:, None], prompt].set(True)

  def pick(i, logits, held, is_done):
    token = choose(logits, i, held).astype(jnp.int32)
    if end is not None:
      token = jnp.where(is_done, end, token)
      is_done = token == end
    if is_holding:
      held = held.at[rows, token].set(True)
    return token, held, is_done

  def advance(carry):
    i, tokens, cache, token, held, is_done = carry
    logits, cache = step(token[:, None], cache)
    token, held, is_done = pick(i, logits, held, is_done)
    tokens = lax.dynamic_update_index_in_dim(tokens, token, i, axis=1)
    return i + 1, tokens, cache, token, held, is_done

  def is_going_on(carry):
    i, *_, is_done = carry
    return (i < num_tokens) & ~is_done.all()

  token, held, is_done = pick(0, logits, held, jnp.zeros(len(prompt), bool))
  tokens = jnp.full((len(prompt), num_tokens), -1 if end is None else end)
  tokens = tokens.astype(jnp.int32).at[:, 0].set(token)
  carry = (jnp.int32(1), tokens, cache, token, held, is_done)
  return lax.while_loop(is_going_on, advance, carry)[1]


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
  """Keeps the `beam_size` likeliest beginnings of each row.

  A beginning is complete when `end` is among the likeliest `beam_size` ways to
  go on; a row has ended when it has that many complete ones. With one beam this
  is `greedy`.

  Args:
    step: see above; called on the prompt, then on b · beam_size rows.
    cache: what `step` starts with.
    prompt: [b, t] tokens to begin from, t > 0.
    num_tokens: how many to write, at most.
    end: the token that ends a row.
    beam_size: beginnings that are kept, at most the size of the vocabulary.
    num_best: how many to return.
    length_penalty: α of Wu et al. 2016, equation 14: scores are logarithms of
      probabilities over ((5 + tokens) / 6)^α, the end counted.

  Returns:
    tokens [b, num_best, num_tokens] int32, the best first, and their scores [b,
    num_best] float32. What has not ended in `num_tokens` comes after what has.

  Raises:
    ValueError: an unfit prompt, or numbers out of range.
  """
  prompt = _check(prompt, num_tokens)
  num_rows = len(prompt)
  logits, cache = step(prompt, cache)
  vocab_size = logits.shape[-1]
  if not 1 <= beam_size <= vocab_size:
    raise ValueError(
      f'beam_size: expected 1 to {vocab_size}, the size of the vocabulary, '
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
  # All beams are alike at first: one of them counts.
  scores = jnp.broadcast_to(jnp.arange(beam_size) == 0, shape)
  alive = tokens, jnp.where(scores, 0.0, -jnp.inf)
  complete = tokens, jnp.full(shape, -jnp.inf)
  cache = _on_rows(lambda x: jnp.repeat(x, beam_size, axis=0), cache)
  logits = jnp.repeat(logits, beam_size, axis=0)
  parents, alive, complete = search(0, logits, alive, complete)

  def advance(carry):
    i, cache, parents, alive, complete = carry
    cache = _on_rows(lambda x: x[parents], cache)
    last = lax.dynamic_index_in_dim(alive[0], i - 1, 2, keepdims=False)
    logits, cache = step(last.reshape(-1, 1), cache)
    parents, alive, complete = search(i, logits, alive, complete)
    return i + 1, cache, parents, alive, complete

  def is_going_on(carry):
    i, *_, (_, scores) = carry
    return (i < num_tokens) & jnp.isneginf(scores).any()

  carry = (jnp.int32(1), cache, parents, alive, complete)
  *_, alive, complete = lax.while_loop(is_going_on, advance, carry)
  # What is alive fills the places of what never completed.
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
  """One token more on each beam.

  Args:
    i: number of the token.
    logits: [b · n, v] after the beams that are alive.
    alive: tokens [b, n, t] and sums of log-probabilities [b, n].
    complete: tokens [b, n, t] and normalised scores [b, n].
    end: the token that completes.
    length_penalty: see `beam_search`.

  Returns:
    parents [b · n], the rows that the new beams go on from, and the new alive
    and complete.
  """
  tokens, scores = alive
  num_rows, beam_size, _ = tokens.shape
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  vocab_size = log_probs.shape[-1]
  sums = scores[..., None] + log_probs.reshape(num_rows, beam_size, vocab_size)
  # Twice as many as beams: half of them may end, and n others go on.
  count = min(2 * beam_size, beam_size * vocab_size)
  sums, at = lax.top_k(sums.reshape(num_rows, -1), count)
  parents, token = at // vocab_size, (at % vocab_size).astype(jnp.int32)
  written = jnp.take_along_axis(tokens, parents[..., None], axis=1)
  written = lax.dynamic_update_index_in_dim(written, token, i, axis=2)

  is_end = token == end
  is_best = jnp.arange(count) < beam_size
  # A row that has all its beams complete keeps them.
  is_open = jnp.isneginf(complete[1]).any(-1, keepdims=True)
  ended = sums / _normaliser(i + 1, length_penalty)
  ended = jnp.where(is_end & is_best & is_open, ended, -jnp.inf)
  complete = _take_best(
    beam_size,
    jnp.concatenate([complete[1], ended], axis=1),
    jnp.concatenate([complete[0], written], axis=1),
  )
  going_on = jnp.where(is_end, -jnp.inf, sums)
  *alive, parents = _take_best(beam_size, going_on, written, parents)
  rows = jnp.arange(num_rows)[:, None] * beam_size
  return (rows + parents).reshape(-1), tuple(alive), complete


def _take_best(count, scores, tokens, *others):
  """The best `count` along axis 1: (tokens, scores, *others)."""
  scores, at = lax.top_k(scores, count)
  taken = [jnp.take_along_axis(x, at, axis=1) for x in others]
  return jnp.take_along_axis(tokens, at[..., None], axis=1), scores, *taken


def _normaliser(length, alpha):
  return ((5 + length) / 6) ** alpha


def _on_rows(function, cache):
  """function(leaf) on what has a batch axis; scalars stay."""
  return jax.tree.map(lambda x: function(x) if jnp.ndim(x) else x, cache)


def _check(prompt, num_tokens):
  """The prompt as an array, int32 as all tokens after it."""
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
