"""Tile sizes for long sequences, and the tiles that a mask leaves."""

import dataclasses
import math
from typing import NamedTuple

_SIZE = 2**19  # logits per tile: 2 MiB, which fits in cache


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tile sizes, normally chosen by shape; pass them only to experiment."""

  rows: int  # of the flattened batch; divides their number
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
  """Key blocks that a query block attends to, as the boundaries of three runs.

  Block numbers in [first, whole) and [rest, last) are partly masked; those in
  [whole, rest) are not masked at all.
  """

  first: int
  whole: int
  rest: int
  last: int


def find_spans(mask, num_query, num_key, tiles):
  """Return the `Span` of key blocks that each query block attends to.

  All blocks have the same size, so a ragged last one starts early.

  Args:
    mask: a `Mask`, or None.
    num_query: total number of queries.
    num_key: total number of keys.
    tiles: the block sizes, as `Tiles`.

  Returns:
    A tuple of `Span`s, one for each query block.
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
