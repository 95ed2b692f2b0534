"""Attention in JAX and Haiku."""

from attention.modules.multihead import MultiHeadAttention
from attention.modules.transformer import TransformerBlock
from attention.ops.dot_product import (
  dot_product_attention,
  explain,
  self_attention,
)
from attention.ops.masks import Mask
from attention.ops.positions import sinusoidal
from attention.ops.softmax import stable_softmax

__all__ = [
  'Mask',
  'MultiHeadAttention',
  'TransformerBlock',
  'dot_product_attention',
  'explain',
  'self_attention',
  'sinusoidal',
  'stable_softmax',
]
