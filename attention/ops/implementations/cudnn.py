"""cuDNN's attention, through `jax.nn.dot_product_attention`.

It is never the default, because programs that call it compile only where a GPU
is attached.
"""

import dataclasses

import jax
import jax.numpy as jnp

from attention.ops.conditions import Band, Lengths
from attention.ops.implementations.base import Recomputing
from attention.ops.masks import Mask

_MAX_SIZE = 128  # channels per head, on all GPUs that cuDNN supports


@dataclasses.dataclass(frozen=True)
class Cudnn(Recomputing):
  """16-bit dtypes; causal, causal-window and length masks, but no bias."""

  def refusal(self, query, key, value, options):
    size = query.shape[-1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
      return f'expected bfloat16 or float16, got {query.dtype}'
    if not query.dtype == key.dtype == value.dtype:
      return (
        f'expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}'
      )
    if size % 8 or size > _MAX_SIZE or value.shape[-1] != size:
      return (
        'expected keys and values of equal size, a multiple of 8 up to '
        f'{_MAX_SIZE}, got {size} and {value.shape[-1]}'
      )
    if min(*query.shape, *value.shape) == 0:
      return 'empty axes are not supported'
    for name in ('bias', 'sinks', 'dropout', 'vector', 'logit_cap'):
      if getattr(options, name) is not None:
        return f'{name} is not supported'
    try:
      _translate(options.mask)
    except NotImplementedError as reason:
      return str(reason)

  def attend(self, query, key, value, options):
    keywords = _translate(options.mask)
    batch, num_query = query.shape[:-3], query.shape[-3]
    shape = (*query.shape[:-1], value.shape[-1])
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    for name, length in (
      ('query_seq_lengths', num_query),
      ('key_value_seq_lengths', key.shape[-3]),
    ):
      if keywords[name] is not None:
        lengths = jnp.clip(jnp.asarray(keywords[name]), 0, length)
        keywords[name] = jnp.broadcast_to(lengths, batch).reshape(-1)
    output = jax.nn.dot_product_attention(
      *flat, scale=options.scale, implementation='cudnn', **keywords
    ).reshape(shape)
    if options.mask is None:
      return output
    # cuDNN returns a mean for fully masked rows.
    has_key = _has_key(options.mask, num_query, key.shape[-3])
    return jnp.where(has_key[..., None, None], output, 0)

  def __call__(self, query, key, value, options):
    return self.attend(query, key, value, options)


def _translate(mask) -> dict:
  """Convert the mask to arguments of `jax.nn.dot_product_attention`."""
  keywords = dict(
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
  )
  if mask is None:
    return keywords
  bands = Mask(tuple(c for c in mask.conditions if isinstance(c, Band)))
  if bands.conditions:
    low, high = bands.diagonals()
    if not bands.is_band or high != 0 or (low is not None and low > 0):
      raise NotImplementedError('only causal bands are supported')
    keywords['is_causal'] = True
    keywords['local_window_size'] = None if low is None else (-low, 0)
  for condition in mask.conditions:
    if isinstance(condition, Band):
      continue
    if isinstance(condition, Lengths):
      for name, lengths in (
        ('query_seq_lengths', condition.query_lengths),
        ('key_value_seq_lengths', condition.key_lengths),
      ):
        if lengths is not None and keywords[name] is not None:
          raise NotImplementedError('repeated lengths are not supported')
        if lengths is not None:
          keywords[name] = lengths
    else:
      kind = type(condition).__name__.lower()
      raise NotImplementedError(f'Mask.{kind} is not supported')
  return keywords


def _has_key(mask, num_query, num_key):
  """Return whether each query may attend to any key: [*b, q] bool.

  Bands and lengths allow an interval of keys.
  """
  queries = jnp.arange(num_query)
  low, high, is_token = 0, num_key - 1, True
  for condition in mask.conditions:
    if isinstance(condition, Band):
      if condition.low is not None:
        low = jnp.maximum(low, queries + condition.low)
      high = jnp.minimum(high, queries + condition.high)
    else:
      if condition.key_lengths is not None:
        lengths = jnp.asarray(condition.key_lengths)[..., None]
        high = jnp.minimum(high, lengths - 1)
      if condition.query_lengths is not None:
        lengths = jnp.asarray(condition.query_lengths)[..., None]
        is_token = is_token & (queries < lengths)
  return is_token & (low <= high)
