"""Greedy decoding and sampling."""

import jax
import jax.numpy as jnp
from jax import lax

from attention.decoding.filters import check_strategy, narrow, penalise
from attention.decoding.prompts import check_prompt, end_tokens, is_any, prefill


def greedy(
  step,
  cache,
  prompt,
  num_tokens: int,
  *,
  end: int | tuple[int, ...] | None = None,
  chunk_size: int | None = None,
  with_cache: bool = False,
):
  """Decode greedily: choose the most likely token at each step.

  Args:
    step: the model; see `attention.decoding`.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    end: the token that ends a row, or several; None decodes all `num_tokens`.
    chunk_size: see `prefill`.
    with_cache: whether to return the cache too, to go on. It holds all tokens
      but the last, the prompt of the next call.

  Returns:
    Tokens [b, num_tokens] int32, without the prompt; with `with_cache`, a pair
    of the tokens and the cache.

  Raises:
    ValueError: If the prompt is invalid or `num_tokens` < 1.
  """

  def choose(logits, *_):
    return jnp.argmax(logits, axis=-1)

  return _decode(
    step, cache, prompt, num_tokens, choose, end, chunk_size, with_cache
  )


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
  seen=None,
  end: int | tuple[int, ...] | None = None,
  chunk_size: int | None = None,
  with_cache: bool = False,
):
  """Sample each token from the model's next-token distribution.

  The repetition penalty is applied first, then the other options in the order
  of the arguments.

  Args:
    step: the model; see `attention.decoding`.
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
    seen: bool [b, v], tokens that the row contains before the prompt, for the
      penalty of a row that goes on; None for none.
    end: the token that ends a row, or several; None decodes all `num_tokens`.
    chunk_size: see `prefill`.
    with_cache: whether to return the cache too, to go on. It holds all tokens
      but the last, the prompt of the next call.

  Returns:
    Tokens [b, num_tokens] int32, without the prompt; with `with_cache`, a pair
    of the tokens and the cache.

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
    logits = logits.astype(jnp.float32)  # noise and sums need its precision
    if repetition_penalty is not None:
      logits = penalise(logits, present, repetition_penalty)
    if temperature == 0:
      return jnp.argmax(logits, axis=-1)
    logits = narrow(logits, temperature, top_k, top_p, min_p)
    return jax.random.categorical(jax.random.fold_in(rng, i), logits)

  return _decode(
    step,
    cache,
    prompt,
    num_tokens,
    choose,
    end,
    chunk_size,
    with_cache,
    seen=seen,
    tracks_tokens=repetition_penalty is not None,
  )


def _decode(
  step,
  cache,
  prompt,
  num_tokens,
  choose,
  end,
  chunk_size,
  with_cache,
  *,
  seen=None,
  tracks_tokens=False,
):
  """Decode with choose(logits, index, present [b, v]) -> next tokens [b]."""
  prompt = check_prompt(prompt, num_tokens)
  ends = end_tokens(end)
  logits, cache = prefill(step, cache, prompt, chunk_size)
  rows = jnp.arange(len(prompt))
  present = jnp.zeros((), bool)  # tokens in each row, if tracked
  if tracks_tokens:
    present = jnp.zeros(logits.shape, bool) if seen is None else seen
    present = jnp.asarray(present).at[rows[:, None], prompt].set(True)

  def pick(i, logits, present, is_done):
    token = choose(logits, i, present).astype(jnp.int32)
    if len(ends):
      token = jnp.where(is_done, ends[0], token)
      is_done = is_any(token, ends)
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
  tokens = jnp.full((len(prompt), num_tokens), ends[0] if len(ends) else -1)
  tokens = tokens.astype(jnp.int32).at[:, 0].set(token)
  carry = (jnp.int32(1), tokens, cache, token, present, is_done)
  _, tokens, cache, *_ = lax.while_loop(is_unfinished, advance, carry)
  return (tokens, cache) if with_cache else tokens
