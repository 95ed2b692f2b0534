"""Dropout whose bits are a hash of positions, whatever tiles they are in."""

import dataclasses

import jax
import jax.numpy as jnp


def _mix(x):
  """A bijective hash of 32 bits (Wellons 2018, "lowbias32")."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def check_rate(rate: float, name: str = 'dropout_rate') -> None:
  """Raises ValueError unless a share may be dropped; all may not."""
  if not 0 <= rate < 1:
    raise ValueError(f'{name}: expected [0, 1), got {rate}')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
  """Which weights are kept, a function of (seed, batch, head, query, key).

  Any block of the pattern can be asked for by itself, so implementations that
  work in tiles drop the same weights as the whole pattern, in the backward
  pass as in the forward one.
  """

  seed: object  # [2] uint32
  rate: float = dataclasses.field(metadata={'static': True})
  start: object = 0  # number of the first query

  @classmethod
  def create(cls, rng, rate: float) -> 'Dropout':
    return cls(jax.random.bits(rng, (2,), jnp.uint32), float(rate))

  def factor(self, row, query, num_query: int, key, num_key: int):
    """[..., num_query, num_key] float32: 0 or 1 / (1 - rate); see `kept`."""
    kept = self.kept(row, query, num_query, key, num_key)
    return jnp.where(kept, 1 / (1 - self.rate), 0.0)

  def kept(self, row, query, num_query: int, key, num_key: int):
    """[..., num_query, num_key] bool.

    Args:
      row: [...] integers that number batch rows and heads.
      query: first query of the block; may be traced. So may `key`.
      num_query: queries in the block.
      key: first key of the block.
      num_key: keys in the block.
    """
    row = jnp.asarray(row)[..., None, None]
    queries = query + jnp.arange(num_query)[:, None]
    return self.kept_at(row, queries, key + jnp.arange(num_key))

  def kept_at(self, row, queries, keys):
    """The same at positions: bool, of integer arrays that broadcast."""
    row, queries, keys = (
      x.astype(jnp.uint32) for x in (row, self.start + queries, keys)
    )
    line = _mix((_mix(row + self.seed[0]) ^ queries) + self.seed[1])
    bits = _mix(line ^ _mix(keys + self.seed[0]))
    threshold = jnp.uint32(round(self.rate * (2**32 - 1)))
    return bits >= threshold
