"""The Evoformer (Jumper et al. 2021, Suppl. 1.6), with AlphaFold's names."""

from attention.modules.evoformer.layers import (
  MSAColumnAttention,
  MSAColumnGlobalAttention,
  MSARowAttentionWithPairBias,
  OuterProductMean,
  Transition,
  TriangleAttention,
  TriangleMultiplication,
)
from attention.modules.evoformer.stack import (
  EvoformerBlock,
  EvoformerStack,
  drop_shared,
  update_in_turn,
)

__all__ = [
  'EvoformerBlock',
  'EvoformerStack',
  'MSAColumnAttention',
  'MSAColumnGlobalAttention',
  'MSARowAttentionWithPairBias',
  'OuterProductMean',
  'Transition',
  'TriangleAttention',
  'TriangleMultiplication',
  'drop_shared',
  'update_in_turn',
]
