"""How a model encodes positions: codes added to its input, or a bias."""

import haiku as hk
import jax.numpy as jnp

from attention.modules.layers import add
from attention.ops.biases import alibi, relative_buckets
from attention.ops.cache import Cache
from attention.ops.positions import sinusoidal

POSITIONS = ('learned', 'sinusoidal', 'rotary', 'alibi', 't5', 'none')

_BUCKETS = 32  # of T5's bias


def add_codes(
  x,
  kind: str,
  table_size: int,
  *,
  name: str,
  scale: float = 1.0,
  cache: Cache | None = None,
):
  """Adds position codes to a model's input.

  Args:
    x: [b, t, m].
    kind: 'learned' adds a table of parameters, 'sinusoidal' the codes of
      Vaswani et al. 2017; other kinds add nothing.
    table_size: positions in the learned table.
    name: the table's parameter name.
    scale: of sinusoidal codes, whose root mean square is 1/√2 times that.
    cache: decoding continues at its positions; without one they start at 0.

  Returns:
    [b, t, m].
  """
  if kind not in ('learned', 'sinusoidal'):
    return x
  count, width = x.shape[-2:]
  if kind == 'learned':
    codes = hk.get_parameter(
      name, (table_size, width), x.dtype, hk.initializers.RandomNormal(0.02)
    )
  else:
    codes = sinusoidal(count if cache is None else cache.capacity, width)
    codes = (scale * codes).astype(x.dtype)
  return add(
    x, codes[:count] if cache is None else codes[cache.positions(count)]
  )


def position_bias(kind: str, num_heads: int, *, is_causal: bool, name: str):
  """The bias that 'alibi' or 't5' adds to self-attention's logits.

  All layers share one bias, as in T5 (Raffel et al. 2020, section 2.1).

  Args:
    kind: one of `POSITIONS`.
    num_heads: heads, h.
    is_causal: whether keys after the query are masked, so that T5 needs buckets
      for the keys before it only.
    name: of T5's parameter, a table [32, h].

  Returns:
    A bias description, or None for other kinds.
  """
  if kind == 'alibi':
    return alibi(num_heads)
  if kind == 't5':
    table = hk.get_parameter(
      name,
      (_BUCKETS, num_heads),
      jnp.float32,
      hk.initializers.RandomNormal(0.02),
    )
    return relative_buckets(table, _BUCKETS, is_bidirectional=not is_causal)
  return None
