"""The Evoformer (Jumper et al. 2021, Suppl. 1.6), with AlphaFold's names.

All layers process a few rows at a time and recompute their intermediate
activations in the backward pass; `remat=False` stores them instead. The rows
run along the layer's `axis` of its activations.

If the mesh in context has the axis `mesh_axis`, each of its devices holds and
computes its own rows (Cheng et al. 2022, "FastFold").
"""

from attention.modules.evoformer.axial_attention import (
  MSAColumnAttention,
  MSAColumnGlobalAttention,
  MSARowAttentionWithPairBias,
  TriangleAttention,
)
from attention.modules.evoformer.products import (
  OuterProductMean,
  TriangleMultiplication,
)
from attention.modules.evoformer.stack import (
  EvoformerBlock,
  EvoformerStack,
  drop_shared,
  update_in_turn,
)
from attention.modules.evoformer.transition import Transition

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
