"""Options of sampling: what they change in the next token's distribution."""

import jax
import jax.numpy as jnp
from jax import lax


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


def narrow(logits, temperature, top_k, top_p, min_p):
  """Apply the options to logits [*b, v]; the temperature is above 0."""
  logits = logits / temperature
  for function, value in ((_top_k, top_k), (_top_p, top_p), (_min_p, min_p)):
    if value is not None:
      logits = function(logits, value)
  return logits


def probabilities(logits, temperature, **options):
  """The distribution [*b, v] float32 of the next token, under the options."""
  logits = logits.astype(jnp.float32)
  if temperature == 0:
    most = jnp.argmax(logits, axis=-1)
    return jax.nn.one_hot(most, logits.shape[-1], dtype=jnp.float32)
  return jax.nn.softmax(narrow(logits, temperature, **options), axis=-1)


def penalise(logits, present, penalty):
  """Apply the repetition penalty to the logits of tokens that are present."""
  changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(present, changed, logits)


def _top_k(logits, k):
  least = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < least, -jnp.inf, logits)


def _top_p(logits, p):
  if p == 1:  # rounding would drop the least likely tokens
    return logits
  ordered = -jnp.sort(-logits, axis=-1)
  each = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(each, axis=-1) - each
  least = jnp.where(before < p, ordered, jnp.inf).min(-1, keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)


def _min_p(logits, p):
  # A factor p in probability is an offset log p in logits.
  least = logits.max(-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits < least, -jnp.inf, logits)
