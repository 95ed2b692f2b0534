"""Beam search."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from attention.decoding.prompts import check_prompt, end_tokens, is_any, prefill


def beam_search(
  step,
  cache,
  prompt,
  num_tokens: int,
  *,
  end: int | tuple[int, ...],
  beam_size: int = 5,
  num_best: int = 1,
  length_penalty: float = 0.6,
  chunk_size: int | None = None,
):
  """Decode with beam search.

  A hypothesis is complete when it ends while it is among the `beam_size` most
  likely candidates of its row. A row has ended when it has `beam_size` complete
  hypotheses. With one beam this is `greedy`.

  Args:
    step: the model; see `attention.decoding`. It is called on the prompt, then
      on b · beam_size rows.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    end: the token that ends a row, or several.
    beam_size: hypotheses per row, at most the vocabulary size.
    num_best: the number of hypotheses to return.
    length_penalty: α of Wu et al. 2016, equation 14. Scores are
      log-probabilities divided by ((5 + length) / 6)^α, where the length
      includes the end token.
    chunk_size: see `prefill`.

  Returns:
    tokens [b, num_best, num_tokens] int32, best first, and their scores [b,
    num_best] float32. Hypotheses without an end token come last.

  Raises:
    ValueError: If the prompt is invalid or a number is out of range.
  """
  prompt = check_prompt(prompt, num_tokens)
  num_rows = len(prompt)
  ends = end_tokens(end)
  if not len(ends):
    raise ValueError(f'end: expected one token or more, got {end}')
  logits, cache = prefill(step, cache, prompt, chunk_size)
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
    _advance_beams, ends=ends, length_penalty=length_penalty
  )
  shape = (num_rows, beam_size)
  tokens = jnp.full((*shape, num_tokens), ends[0], jnp.int32)
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


def _advance_beams(i, logits, alive, complete, *, ends, length_penalty):
  """Extend each beam by one token.

  Args:
    i: index of the new token.
    logits: [b · n, v] of the beams that are alive.
    alive: tokens [b, n, t] and their log-probabilities [b, n].
    complete: tokens [b, n, t] and normalised scores [b, n].
    ends: [e], the tokens that complete a hypothesis.
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
  # At most n · e of the n · (e + 1) best candidates end; n others can continue.
  count = min(beam_size * (1 + len(ends)), beam_size * vocab_size)
  sums, at = lax.top_k(sums.reshape(num_rows, -1), count)
  parents, token = at // vocab_size, (at % vocab_size).astype(jnp.int32)
  written = jnp.take_along_axis(tokens, parents[..., None], axis=1)
  written = lax.dynamic_update_index_in_dim(written, token, i, axis=2)

  is_end = is_any(token, ends)
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
