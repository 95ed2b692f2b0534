"""The arguments of attention other than query, key and value."""

import dataclasses

import jax

from attention.ops.biases import ArrayBias
from attention.ops.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
  """Checked options of `dot_product_attention`; a pytree.

  Fields that hold leaves have no precise types, because a type checker would
  reject the placeholder objects that JAX puts there.
  """

  bias: object = None  # Bias
  mask: object = None  # Mask: all masks combined, is_causal too
  sinks: object = None  # [h]
  dropout: object = None  # Dropout
  vector: object = None  # [h, d]; selects additive similarity
  scale: float = dataclasses.field(metadata={'static': True}, default=1.0)
  logit_cap: float | None = dataclasses.field(
    metadata={'static': True}, default=None
  )

  def at_queries(self, batch: tuple, rows: int, start, count: int, keys: int):
    """Return the options of `count` queries from `start` on.

    Args:
      batch: shape of the whole batch, *b.
      rows: number of rows of the flattened batch.
      start: first query; may be traced.
      count: number of queries.
      keys: number of keys.
    """
    bias, mask, dropout = self.bias, self.mask, self.dropout
    if bias is not None:
      bias = ArrayBias(bias.tile(batch, 0, rows, start, count, 0, keys))
    if mask is not None:
      allowed = mask.rows(batch, 0, rows).tile(start, count, 0, keys)
      mask = Mask.dense(
        allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
      )
    if dropout is not None:
      dropout = dataclasses.replace(dropout, start=start)
    return dataclasses.replace(self, bias=bias, mask=mask, dropout=dropout)
