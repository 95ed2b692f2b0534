"""What all decoding begins with: checks, and reading the prompt."""

import jax.numpy as jnp
from jax import lax


def prefill(step, cache, prompt, chunk_size: int | None = None):
  """Read a prompt in chunks, so that attention needs less memory.

  The first chunk is shorter if `chunk_size` does not divide the prompt. The
  others are read in one loop.

  Args:
    step: the model; see `attention.decoding`. It is called on the first chunk,
      then on the others, and must not change the cache's structure again.
    cache: the initial cache.
    prompt: tokens [b, t], t > 0.
    chunk_size: tokens per chunk; None reads the prompt at once.

  Returns:
    The logits [b, v] of the token after the prompt, and the cache.

  Raises:
    ValueError: If the prompt is invalid or `chunk_size` < 1.
  """
  prompt = check_prompt(prompt)
  num_rows, length = prompt.shape
  if chunk_size is None:
    return step(prompt, cache)
  if chunk_size < 1:
    raise ValueError(f'chunk_size: expected 1 or more, got {chunk_size}')
  first = (length - 1) % chunk_size + 1
  read = step(prompt[:, :first], cache)
  if first == length:
    return read
  rest = prompt[:, first:].reshape(num_rows, -1, chunk_size).swapaxes(0, 1)

  def read_chunk(read, tokens):
    return step(tokens, read[1]), None

  return lax.scan(read_chunk, read, rest)[0]


def check_prompt(prompt, num_tokens: int = 1):
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


def end_tokens(end):
  """Return the end tokens as an array [e] int32, which may be empty."""
  return jnp.atleast_1d(jnp.asarray(() if end is None else end, jnp.int32))


def is_any(tokens, ends):
  """Whether each token is one of `ends` [e]; for none, a single False."""
  if not len(ends):
    return jnp.zeros((), bool)
  return (tokens[..., None] == ends).any(-1)
