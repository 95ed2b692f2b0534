"""What all models share: their blocks, position codes, masks and norms."""

import dataclasses

import haiku as hk
import jax

from attention.modules.fields import check_choice, check_count
from attention.modules.layers import NORMS, dropout
from attention.modules.positions import POSITIONS, add_codes, position_bias
from attention.modules.transformer import TransformerBlock
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class Transformer(hk.Module):
  """The fields of every model; models are its subclasses."""

  num_layers: int
  num_heads: int
  model_size: int
  hidden_size: int | None = None  # feed-forward width; see TransformerBlock
  positions: str = 'learned'  # sinusoidal, rotary, alibi, t5 or none
  norm: str = 'pre'  # or 'post'
  norm_kind: str = 'layer'  # or 'rms'
  activation: str = 'gelu'  # relu, silu, geglu or swiglu
  mixer: str = 'attention'  # or, for comparison, 'lstm' or 'conv'
  window: int | None = None  # reach of self-attention, itself included
  dropout_rate: float = 0.0
  attention: dict | None = None  # further fields of MultiHeadAttention
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def check(self) -> None:
    """Raises ValueError for a field with an impossible value."""
    for field in ('num_layers', 'num_heads', 'model_size', 'window'):
      check_count(field, getattr(self, field))
    check_choice('positions', self.positions, POSITIONS)
    if self.model_size % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of model_size={self.model_size}, '
        f'got {self.num_heads}'
      )

  @hk.transparent
  def block(self, name: str, **fields) -> TransformerBlock:
    """The block of that name; `fields` are further fields of it."""
    attention = {
      'implementation': self.implementation,
      **(self.attention or {}),
    }
    if self.positions == 'rotary':
      attention['with_rotary'] = True
    attention.update(fields.pop('attention', {}))
    return TransformerBlock(
      num_heads=self.num_heads,
      mixer=self.mixer,
      hidden_size=self.hidden_size,
      norm=self.norm,
      norm_kind=self.norm_kind,
      activation=self.activation,
      dropout_rate=self.dropout_rate,
      attention=attention,
      name=name,
      **fields,
    )

  @hk.transparent
  def add_positions(
    self,
    x,
    table_size,
    is_training,
    *,
    name='positions',
    scale=1.0,
    cache=None,
  ):
    """Adds position codes (see `add_codes`) and applies dropout."""
    x = add_codes(
      x, self.positions, table_size, name=name, scale=scale, cache=cache
    )
    x = dropout(x, self.dropout_rate, is_training)
    # Materialises the sum; see TransformerBlock.
    return jax.lax.optimization_barrier(x)

  @hk.transparent
  def self_attention(self, *, is_causal: bool, name: str = 'position_bias'):
    """The mask (or None) and bias (or None) of self-attention."""
    mask = Mask.causal() if is_causal else None
    if self.window is not None:
      reach = self.window - 1
      window = Mask.window(reach, 0 if is_causal else reach)
      mask = window if mask is None else mask & window
    bias = position_bias(
      self.positions, self.num_heads, is_causal=is_causal, name=name
    )
    return mask, bias

  @hk.transparent
  def final_norm(self, x, name: str = 'final_norm'):
    """Normalises the output of the last block, where blocks are pre-norm."""
    return NORMS[self.norm_kind](name)(x) if self.norm == 'pre' else x
