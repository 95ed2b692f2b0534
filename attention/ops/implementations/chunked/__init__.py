"""Attention in memory that grows with q + k, in plain XLA, on every platform.

Two shapes of work want two loops: many short sequences are computed some rows
of the batch at a time (rows.py), few long ones in tiles of queries × keys
(blocks.py); additive similarity some queries at a time (queries.py). In all,
logits exist a piece at a time, forward and backward (Rabe & Staats 2021; Dao et
al. 2022), a bias gets its gradient at its own size, and sums run in a fixed
order: two runs give the same bits.

Pieces are cut by platform. On CPUs they fit into caches. A GPU pays
microseconds for every kernel that it starts, and a TPU for every trip of a
loop: there pieces are few and large.
"""

import dataclasses

from attention.ops.implementations.base import Implementation
from attention.ops.implementations.chunked.batch_loop import BatchLoop
from attention.ops.implementations.chunked.query_loop import QueryLoop
from attention.ops.implementations.chunked.tile_loop import TileLoop
from attention.ops.implementations.chunked.tiles import Tiles
from attention.ops.options import Options

_CPU_ROW = 2**20  # logits of a row of the batch, 4 MiB, that caches hold
_LARGE = 2**25  # logits of a piece elsewhere, 128 MiB


@dataclasses.dataclass(frozen=True)
class Chunked(Implementation):
  """Chooses the loop by shape."""

  is_cpu: bool = True  # pieces that caches hold; else few and large ones

  def refusal(self, query, key, value, options: Options):
    del key, options
    if min(*query.shape, *value.shape) == 0:
      return 'an axis without positions'

  def forward(self, query, key, value, options):
    return self._loop(query, key, options).forward(query, key, value, options)

  def backward(self, query, key, value, options, *others):
    loop = self._loop(query, key, options)
    return loop.backward(query, key, value, options, *others)

  def _loop(self, query, key, options):
    heads, queries, keys = query.shape[-2], query.shape[-3], key.shape[-3]
    row = heads * queries * keys
    if options.vector is not None:
      return QueryLoop() if self.is_cpu else QueryLoop(size=_LARGE)
    if self.is_cpu:
      return BatchLoop() if row <= _CPU_ROW else TileLoop()
    if row <= _LARGE:
      return BatchLoop(forward_size=_LARGE, backward_size=_LARGE)
    return TileLoop(Tiles.choose(heads, queries, keys, _LARGE))
