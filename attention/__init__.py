"""Attention in JAX and Haiku."""

from attention.capture import capture
from attention.edit import Edit, edit
from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.multihead import MultiHeadAttention
from attention.modules.transformer import TransformerBlock
from attention.ops.attention_weights import attention_weights
from attention.ops.biases import alibi, relative_buckets
from attention.ops.cache import Cache, CrossCache
from attention.ops.context import context_attention
from attention.ops.dot_product import (
  additive_attention,
  dot_product_attention,
  explain,
  self_attention,
)
from attention.ops.masks import Mask
from attention.ops.positions import rotary, sinusoidal
from attention.ops.softmax import stable_softmax

__all__ = [
  'Cache',
  'CrossCache',
  'Edit',
  'GatedAttention',
  'GlobalAttention',
  'Mask',
  'MultiHeadAttention',
  'TransformerBlock',
  'additive_attention',
  'alibi',
  'attention_weights',
  'capture',
  'context_attention',
  'dot_product_attention',
  'edit',
  'explain',
  'relative_buckets',
  'rotary',
  'self_attention',
  'sinusoidal',
  'stable_softmax',
]
