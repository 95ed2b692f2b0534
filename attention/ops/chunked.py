"""Attention in memory that grows with q + k, in plain XLA, on every platform.

Two shapes of work want two loops: many short sequences are served some rows of
the batch at a time (rows.py), few long ones in blocks of queries × keys
(blocks.py); additive similarity is served some queries at a time (queries.py).
In all, logits exist a piece at a time, forward and backward
(Rabe & Staats 2021; Dao et al. 2022), a bias gets its gradient at its own size,
and sums run in a fixed order: two runs give the same bits.
"""

import math

from attention.ops import blocks, queries, rows
from attention.ops.call import Call

_ROW_SIZE = 2**20  # logits of a row of the batch, 4 MiB, that caches hold


def attention(query, key, value, call: Call):
  """See `dot_product_attention`; the arguments are checked already."""
  logits = math.prod(query.shape[-3:-1]) * key.shape[-3]
  if min(*query.shape, *value.shape) == 0:
    raise NotImplementedError('an axis without positions')
  if call.vector is not None:
    serve = queries.attention
  elif logits <= _ROW_SIZE:
    serve = rows.attention
  else:
    serve = blocks.attention
  return serve(query, key, value, call)
