"""Speculative decoding: a small model proposes, a large one checks."""

import jax
import jax.numpy as jnp
from jax import lax

from attention.decoding import rewinding
from attention.decoding.filters import check_strategy, probabilities
from attention.decoding.prompts import check_prompt, end_tokens, is_any, prefill


def speculative(
  step,
  cache,
  draft,
  draft_cache,
  prompt,
  num_tokens: int,
  rng=None,
  *,
  num_draft: int = 4,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  end: int | tuple[int, ...] | None = None,
  chunk_size: int | None = None,
  with_cache: bool = False,
  rewind=None,
):
  """Sample from a large model, faster with proposals of a small one.

  The draft proposes `num_draft` tokens one by one, and the large model computes
  their probabilities in a single call. Proposals are accepted from the first on
  until one is rejected, which is replaced, such that the tokens have exactly
  the large model's distribution (Leviathan et al. 2023, algorithm 1). With
  temperature 0 they are its greedy tokens, up to its own rounding errors, which
  may differ between calls on one token and on several.

  Rows share the length of their caches, so as many proposals count in all rows
  as in the one with the fewest; this does not change the distribution.

  Args:
    step: the large model, as in `attention.decoding`, except that it returns
      logits [b, t, v] at all t positions.
    cache: its initial cache: a tree in which each array belongs to a `Cache` or
      `CrossCache`. Capacities must hold the prompt and num_tokens + num_draft -
      1 tokens; windows need spare >= num_draft.
    draft: the small model, as `step`, with the same vocabulary.
    draft_cache: its initial cache, as `cache`.
    prompt: tokens [b, t], t > 0.
    num_tokens: the maximum number of new tokens.
    rng: a `jax.random` key; may be None if the temperature is 0.
    num_draft: number of tokens that the draft proposes at a time.
    temperature: see `sample`; the options apply to both models.
    top_k: see `sample`.
    top_p: see `sample`.
    min_p: see `sample`.
    end: the token that ends a row, or several; None decodes all `num_tokens`.
    chunk_size: see `prefill`.
    with_cache: whether to return the caches too, to go on. They hold all tokens
      but the last, the prompt of the next call.
    rewind: function (cache, count) -> cache that forgets the last `count`
      tokens, for caches of another kind; the function `rewind` by default.

  Returns:
    Tokens [b, num_tokens] int32, without the prompt; and [] float32, how many
    proposals were accepted per call of the large model, 0 to num_draft. With
    `with_cache`, also the pair of caches.

  Raises:
    ValueError: If an argument is invalid, or a cache of the wrong size or kind.
  """
  options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
  check_strategy(**options)
  prompt = check_prompt(prompt, num_tokens)
  if num_draft < 1:
    raise ValueError(f'num_draft: expected 1 or more, got {num_draft}')
  if rng is None:
    if temperature != 0:
      raise ValueError(
        f'rng: expected a key for temperature={temperature}, got None'
      )
    rng = jax.random.key(0)  # chooses from one token each
  has_known_caches = rewind is None
  rewind = rewind or rewinding.rewind
  if has_known_caches:
    size = prompt.shape[1] + num_tokens + num_draft - 1
    rewinding.check_capacity('cache', cache, size)
    rewinding.check_capacity('draft_cache', draft_cache, size)
  ends = end_tokens(end)

  def distributions(logits):
    return probabilities(logits, **options)

  logits, cache = prefill(_last(step), cache, prompt, chunk_size)
  other, draft_cache = prefill(_last(draft), draft_cache, prompt, chunk_size)
  if logits.shape != other.shape:
    raise ValueError(
      f'draft: expected a vocabulary of {logits.shape[-1]} like that of step, '
      f'got {other.shape[-1]}'
    )
  if has_known_caches:
    rewinding.check_spare('cache', cache, num_draft)
    rewinding.check_spare('draft_cache', draft_cache, num_draft)

  def propose(carry, rng):
    inputs, draft_cache = carry
    logits, draft_cache = draft(inputs, draft_cache)
    guess = distributions(logits[:, -1])
    token = _draw(rng, guess)
    return (token[:, None], draft_cache), (token, guess)

  def advance(carry):
    count, calls, tokens, last, (cache, draft_cache), is_done = carry
    rngs = jax.random.split(jax.random.fold_in(rng, count), num_draft + 1)
    # The draft never reads its own last proposal. If that was accepted, it is
    # the first of the two tokens that it reads now; otherwise that is in the
    # place where it has read another.
    carry, first = propose((last, draft_cache), rngs[1])
    (_, draft_cache), others = lax.scan(propose, carry, rngs[2:])
    proposed, guesses = jax.tree.map(
      lambda x, xs: jnp.concatenate([x[None], xs]).swapaxes(0, 1), first, others
    )
    inputs = jnp.concatenate([last[:, 1:], proposed], axis=1)
    logits, cache = step(inputs, cache)
    accepted, token = _accept(
      rngs[0], proposed, guesses, distributions(logits), is_done
    )
    new = jnp.concatenate([proposed, token[:, None]], axis=1)
    new = lax.dynamic_update_index_in_dim(new, token, accepted, axis=1)
    tokens = lax.dynamic_update_slice_in_dim(tokens, new, count, axis=1)
    is_end = is_any(new, ends) & (jnp.arange(num_draft + 1) <= accepted)
    surplus = num_draft - accepted
    caches = rewind(cache, surplus), rewind(draft_cache, surplus)
    is_done = is_done | is_end.any(-1)
    known = jnp.concatenate([inputs, token[:, None]], axis=1)
    before = lax.dynamic_index_in_dim(known, accepted, 1, keepdims=False)
    last = jnp.stack([before, token], axis=1)
    return count + accepted + 1, calls + 1, tokens, last, caches, is_done

  def is_unfinished(carry):
    count, *_, is_done = carry
    return (count < num_tokens) & ~is_done.all()

  token = _draw(jax.random.fold_in(rng, 0), distributions(logits))
  tokens = jnp.zeros((len(prompt), num_tokens + num_draft), jnp.int32)
  tokens = tokens.at[:, 0].set(token)
  is_done = jnp.broadcast_to(is_any(token, ends), token.shape)
  last = jnp.stack([prompt[:, -1], token], axis=1)
  caches = cache, rewind(draft_cache, 1)
  carry = jnp.int32(1), jnp.int32(0), tokens, last, caches, is_done
  count, calls, tokens, last, caches, _ = lax.while_loop(
    is_unfinished, advance, carry
  )
  written = jnp.concatenate([prompt[:, -1:], tokens], axis=1)
  tokens = tokens[:, :num_tokens]
  if len(ends):
    is_end = is_any(tokens, ends)
    is_past = jnp.cumsum(is_end, axis=1, dtype=jnp.int32) > is_end
    tokens = jnp.where(is_past, ends[0], tokens)
  accepted = ((count - 1 - calls) / jnp.maximum(calls, 1)).astype(jnp.float32)
  if not with_cache:
    return tokens, accepted
  surplus = jnp.maximum(count - num_tokens, 0)
  cache, draft_cache = (rewind(x, surplus) for x in caches)
  # The draft has not read the token before the last.
  at = jnp.minimum(count, num_tokens) - 1
  missing = lax.dynamic_slice_in_dim(written, at, 1, axis=1)
  return tokens, accepted, (cache, draft(missing, draft_cache)[1])


def _accept(rng, proposed, guesses, truth, is_done):
  """Accept proposals x with probability min(1, p(x) / q(x)).

  Args:
    rng: a key.
    proposed: [b, n] tokens.
    guesses: [b, n, v], the distributions q that they are drawn from.
    truth: [b, n + 1, v], the large model's distributions p.
    is_done: [b] rows whose tokens do not matter.

  Returns:
    How many are accepted in all rows, [] int32; and the tokens [b] after those.
  """
  first, second = jax.random.split(rng)
  p, q = (
    jnp.take_along_axis(x, proposed[..., None], axis=-1)[..., 0]
    for x in (truth[:, :-1], guesses)
  )
  is_accepted = jax.random.uniform(first, p.shape, p.dtype) * q < p
  each = jnp.cumprod(is_accepted, axis=1, dtype=jnp.int32)
  each = each.sum(1, dtype=jnp.int32)
  each = jnp.where(is_done, proposed.shape[1], each)
  least = each.min()
  # After the last proposal there is none to reject: q is 0.
  guesses = jnp.pad(guesses, ((0, 0), (0, 1), (0, 0)))
  proposed = jnp.pad(proposed, ((0, 0), (0, 1)))
  p, q, kept = (
    lax.dynamic_index_in_dim(x, least, 1, keepdims=False)
    for x in (truth, guesses, proposed)
  )
  rest = jnp.maximum(p - q, 0)
  # All 0 if p = q, which rounding alone rejects.
  rest = jnp.where(rest.any(-1, keepdims=True), rest, p)
  return least, jnp.where(each > least, kept, _draw(second, rest))


def _draw(rng, weights):
  """Draw from distributions [b, v] that need not be normalised."""
  return jax.random.categorical(rng, jnp.log(weights)).astype(jnp.int32)


def _last(step):
  def last(tokens, cache):
    logits, cache = step(tokens, cache)
    return logits[:, -1], cache

  return last
