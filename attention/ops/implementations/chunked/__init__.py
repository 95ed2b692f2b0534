"""Attention in O(q + k) memory, in plain XLA, on every platform.

There is one loop for each kind of input:

- `BatchLoop` (batch_loop.py) handles many short sequences, a chunk of batch
  rows at a time.
- `TileLoop` (tile_loop.py) handles few long sequences, in tiles of queries ×
  keys.
- `QueryLoop` (query_loop.py) handles additive similarity, a chunk of queries at
  a time.

Each loop holds only one chunk of the logits in memory, forward and backward
(Rabe & Staats 2021; Dao et al. 2022), and accumulates the gradient of a bias in
an array of the bias's size. Accumulation order is fixed, so results are
bitwise reproducible.

Chunk sizes depend on the platform. On CPUs, a chunk fits in cache. Every kernel
launch on a GPU and every loop iteration on a TPU costs microseconds, so chunks
there are few and large.
"""

import dataclasses

from attention.ops.implementations.base import Implementation
from attention.ops.implementations.chunked.batch_loop import BatchLoop
from attention.ops.implementations.chunked.query_loop import QueryLoop
from attention.ops.implementations.chunked.tile_loop import TileLoop
from attention.ops.implementations.chunked.tiles import Tiles
from attention.ops.options import Options

_CPU_ROW = 2**20  # logits of one batch row that fit in cache: 4 MiB
_ACCELERATOR_SIZE = 2**25  # logits per chunk on GPUs and TPUs: 128 MiB


@dataclasses.dataclass(frozen=True)
class Chunked(Implementation):
  """Select a loop by similarity, platform and shape."""

  is_cpu: bool = True  # small chunks that fit in cache, else few large ones

  def refusal(self, query, key, value, options: Options):
    del key, options
    if min(*query.shape, *value.shape) == 0:
      return 'empty axes are not supported'

  def forward(self, query, key, value, options):
    return self._loop(query, key, options).forward(query, key, value, options)

  def backward(self, query, key, value, options, *others):
    loop = self._loop(query, key, options)
    return loop.backward(query, key, value, options, *others)

  def of_blocks(self, query, key, value, options):
    del value, options
    return self._tile_loop(query, key)

  def _tile_loop(self, query, key):
    if self.is_cpu:
      return TileLoop()
    heads, queries, keys = query.shape[-2], query.shape[-3], key.shape[-3]
    return TileLoop(Tiles.choose(heads, queries, keys, _ACCELERATOR_SIZE))

  def _loop(self, query, key, options):
    heads, queries, keys = query.shape[-2], query.shape[-3], key.shape[-3]
    row = heads * queries * keys
    if options.vector is not None:
      return QueryLoop() if self.is_cpu else QueryLoop(size=_ACCELERATOR_SIZE)
    if self.is_cpu:
      return (
        BatchLoop()
        if row <= _CPU_ROW
        else self.of_blocks(query, key, None, options)
      )
    if row <= _ACCELERATOR_SIZE:
      return BatchLoop(
        forward_size=_ACCELERATOR_SIZE, backward_size=_ACCELERATOR_SIZE
      )
    return self._tile_loop(query, key)
