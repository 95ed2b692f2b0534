"""How the work of long sequences is cut, and what a mask leaves of it."""

import dataclasses
import math
from typing import NamedTuple

_SIZE = 2**19  # logits in a tile: 2 MiB, which caches hold


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How the work is cut; chosen by shape, given for experiments only."""

  rows: int  # of the flattened batch; divides it
  queries: int
  keys: int

  @classmethod
  def choose(
    cls, heads: int, queries: int, keys: int, size: int = _SIZE
  ) -> 'Tiles':
    side = 2 ** (math.isqrt(size // 2 // heads).bit_length() - 1)
    side = max(side, 64)
    if size == _SIZE:
      side = min(side, 256)
    return cls(1, min(2 * side, queries), min(side, keys))


class Span(NamedTuple):
  """Blocks of keys by their numbers, each part up to where the next begins."""

  first: int  # some queries see some keys
  whole: int  # all queries see all keys
  rest: int  # some again see some
  last: int  # the first that is not in it


def find_spans(mask, num_query, num_key, tiles):
  """The `Span` that each block of queries meets.

  Blocks have one size: a ragged last one begins earlier.

  Args:
    mask: a `Mask`, or None.
    num_query: positions in all, as num_key.
    num_key: see above.
    tiles: how they are cut.
  """
  low, high = (None, None) if mask is None else mask.diagonals()
  is_exact = mask is None or mask.is_band
  low = -num_query if low is None else low
  high = num_key if high is None else high
  size, count = tiles.keys, -(-num_key // tiles.keys)
  spans = []
  for block in range(-(-num_query // tiles.queries)):
    top = min(block * tiles.queries, num_query - tiles.queries)
    bottom = top + tiles.queries - 1
    first = min(max(0, (top + low) // size), count)
    last = max(first, min(count, (bottom + high) // size + 1))
    whole = min(max(first, -(-(bottom + low) // size)), last)
    rest = min((top + high + 1) // size, num_key // size, last)
    rest = max(whole, rest) if is_exact else whole
    spans.append(Span(first, whole, rest, last))
  return tuple(spans)
