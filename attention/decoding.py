"""Writing tokens one after another, with any model.

A model is a function `step(tokens, cache) -> (logits, cache)`: it takes the
tokens [b, t] that come next and gives the logits [b, v] of the token after
them. The cache is whatever it needs to remember, of constant shapes.
"""

import jax
import jax.numpy as jnp


def sample(
  step,
  cache,
  prompt,
  num_tokens: int,
  rng,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
):
  """Draws each token from the model's distribution given those before it.

  Args:
    step: see above.
    cache: what `step` starts with.
    prompt: [b, t] tokens to begin from, t > 0.
    num_tokens: how many to draw.
    rng: a key of `jax.random`.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among the k likeliest only; None for all.

  Returns:
    [b, num_tokens] int32, without the prompt.

  Raises:
    ValueError: an empty prompt, negative temperature, or top_k < 1.
  """
  if prompt.shape[1] == 0:
    raise ValueError('prompt: expected at least one token, got none')
  if temperature < 0:
    raise ValueError(f'temperature: expected 0 or more, got {temperature}')
  if top_k is not None and top_k < 1:
    raise ValueError(f'top_k: expected 1 or more, got {top_k}')

  def draw(logits, key):
    if temperature == 0:
      return jnp.argmax(logits, axis=-1)
    if top_k is not None and top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, top_k)[0][..., -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)

  def advance(carry, key):
    logits, cache = carry
    token = draw(logits, key).astype(jnp.int32)
    return step(token[:, None], cache), token

  start = step(prompt, cache)
  # The last token's own step is not needed: its logits are never drawn from.
  *keys, last = jax.random.split(rng, num_tokens)
  if not keys:
    return draw(start[0], last).astype(jnp.int32)[:, None]
  (logits, _), tokens = jax.lax.scan(advance, start, jnp.stack(keys))
  tokens = jnp.concatenate([tokens, draw(logits, last)[None]])
  return tokens.T.astype(jnp.int32)
