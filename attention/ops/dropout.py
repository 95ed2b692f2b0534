"""Dropout whose bits are a hash of positions, independent of tiling."""

import dataclasses

import jax
import jax.numpy as jnp


def _mix(x):
  """A bijective hash of 32 bits (Wellons 2018, "lowbias32")."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def check_rate(rate: float, name: str = 'dropout_rate') -> None:
  """Raise ValueError unless 0 <= rate < 1."""
  if not 0 <= rate < 1:
    raise ValueError(f'{name}: expected [0, 1), got {rate}')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """Selects the weights to keep by (seed, batch, head, query, key).

  Any block of the pattern can be computed by itself, so tiled implementations
  drop the same weights as untiled ones, in the forward and backward pass.
  """

  seed: object  # [2] uint32
  rate: float = dataclasses.field(metadata={'static': True})
  start: object = 0  # position of the first query
  key_start: object = None  # position of the first key; 0 by default
  stride: int = dataclasses.field(metadata={'static': True}, default=1)

  @classmethod
  def create(cls, rng, rate: float) -> 'Dropout':
    return cls(jax.random.bits(rng, (2,), jnp.uint32), float(rate))

  def factor(self, row, query, num_query: int, key, num_key: int):
    """Return [..., num_query, num_key] float32: 0 or 1 / (1 - rate).

    The arguments are those of `kept`.
    """
    kept = self.kept(row, query, num_query, key, num_key)
    return jnp.where(kept, 1 / (1 - self.rate), 0.0)

  def kept(self, row, query, num_query: int, key, num_key: int):
    """Return which weights of a block are kept: [..., num_query, num_key] bool.

    Args:
      row: [...] integers that number batch rows and heads.
      query: first query of the block; may be traced.
      num_query: number of queries in the block.
      key: first key of the block; may be traced.
      num_key: number of keys in the block.
    """
    row = jnp.asarray(row)[..., None, None]
    queries = query + jnp.arange(num_query)[:, None]
    return self.kept_at(row, queries, key + jnp.arange(num_key))

  def kept_at(self, row, queries, keys):
    """Return the same at positions, given as integer arrays that broadcast."""
    queries = self.start + self.stride * queries
    keys = self.stride * keys
    if self.key_start is not None:
      keys = self.key_start + keys
    row, queries, keys = (x.astype(jnp.uint32) for x in (row, queries, keys))
    line = _mix((_mix(row + self.seed[0]) ^ queries) + self.seed[1])
    bits = _mix(line ^ _mix(keys + self.seed[0]))
    threshold = jnp.uint32(round(self.rate * (2**32 - 1)))
    return bits >= threshold
