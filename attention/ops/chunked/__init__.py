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

from attention.ops.call import Call
from attention.ops.chunked.blocks import Blocks
from attention.ops.chunked.queries import Queries
from attention.ops.chunked.rows import Rows
from attention.ops.chunked.tiles import Tiles
from attention.ops.implementation import Implementation

_CPU_ROW = 2**20  # logits of a row of the batch, 4 MiB, that caches hold
_LARGE = 2**25  # logits of a piece elsewhere, 128 MiB


@dataclasses.dataclass(frozen=True)
class Chunked(Implementation):
  """Chooses the loop by shape."""

  is_cpu: bool = True  # pieces that caches hold; else few and large ones

  def refusal(self, query, key, value, call: Call):
    del key, call
    if min(*query.shape, *value.shape) == 0:
      return 'an axis without positions'

  def forward(self, query, key, value, call):
    return self._loop(query, key, call).forward(query, key, value, call)

  def backward(self, query, key, value, call, *others):
    loop = self._loop(query, key, call)
    return loop.backward(query, key, value, call, *others)

  def _loop(self, query, key, call):
    heads, queries, keys = query.shape[-2], query.shape[-3], key.shape[-3]
    row = heads * queries * keys
    if call.vector is not None:
      return Queries() if self.is_cpu else Queries(size=_LARGE)
    if self.is_cpu:
      return Rows() if row <= _CPU_ROW else Blocks()
    if row <= _LARGE:
      return Rows(forward_size=_LARGE, backward_size=_LARGE)
    return Blocks(Tiles.choose(heads, queries, keys, _LARGE))
