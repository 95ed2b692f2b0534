"""What a call of attention asks for besides query, key and value."""

import dataclasses

import jax

from attention.ops.biases import ArrayBias
from attention.ops.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
  """The checked arguments of `dot_product_attention`; a pytree.

  Fields that hold leaves are not annotated with their types: JAX puts objects
  of its own there, which a type checker would refuse.
  """

  bias: object = None  # a description of biases.py
  mask: object = None  # Mask: everything that masks, joined
  sinks: object = None  # [h]
  dropout: object = None  # Dropout
  vector: object = None  # [h, d]: the similarity is additive
  scale: float = dataclasses.field(metadata={'static': True}, default=1.0)
  logit_cap: float | None = dataclasses.field(
    metadata={'static': True}, default=None
  )

  def at_queries(self, batch: tuple, rows: int, start, count: int, keys: int):
    """The call of `count` queries from `start` on, batch flattened to rows."""
    bias, mask, dropout = self.bias, self.mask, self.dropout
    if bias is not None:
      bias = ArrayBias(bias.tile(batch, 0, rows, start, count, 0, keys))
    if mask is not None:
      seen = mask.rows(batch, 0, rows).tile(start, count, 0, keys)
      mask = Mask.dense(seen.reshape((1,) * (4 - seen.ndim) + seen.shape))
    if dropout is not None:
      dropout = dataclasses.replace(dropout, start=start)
    return dataclasses.replace(self, bias=bias, mask=mask, dropout=dropout)
