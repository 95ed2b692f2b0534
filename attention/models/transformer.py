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
  norm: str = 'pre'  # or 'post', 'both'
  norm_kind: str = 'layer'  # or 'rms', 'zero_centred_rms'
  norm_epsilon: float = 1e-5  # added to the variance, of queries and keys too
  activation: str = 'gelu'  # relu, silu, geglu or swiglu
  with_feed_forward_bias: bool = True
  experts: dict | None = None  # fields of Experts, in place of feed-forward
  mixer: str = 'attention'  # or, for comparison, 'lstm' or 'conv'
  window: int | None = None  # reach of self-attention, itself included
  window_pattern: str = 'w'  # of the layers, repeated: w: window, f: full
  dropout_rate: float = 0.0
  attention: dict | None = None  # further fields of MultiHeadAttention
  window_attention: dict | None = None  # what differs in layers with a window
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def check(self) -> None:
    """Raises ValueError for a field with an impossible value."""
    for field in ('num_layers', 'num_heads', 'model_size', 'window'):
      check_count(field, getattr(self, field))
    check_choice('positions', self.positions, POSITIONS)
    if not self.window_pattern or set(self.window_pattern) - {'w', 'f'}:
      raise ValueError(
        "window_pattern: expected the letters w and f, such as 'wwf', got "
        f'{self.window_pattern!r}'
      )
    key_size = (self.attention or {}).get('key_size')
    if not key_size and self.model_size % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of model_size={self.model_size}, '
        f'got {self.num_heads}; change either, or set attention.key_size'
      )

  def has_window(self, layer: int) -> bool:
    """Whether self-attention of that layer is bounded by the window."""
    pattern = self.window_pattern
    return self.window is not None and pattern[layer % len(pattern)] == 'w'

  @hk.transparent
  def block(self, name: str, layer: int, **fields) -> TransformerBlock:
    """The block of that layer; `fields` are further fields of it."""
    attention = {
      'implementation': self.implementation,
      'qk_norm': {
        'epsilon': self.norm_epsilon,
        'is_zero_centred': self.norm_kind == 'zero_centred_rms',
      },
      **(self.attention or {}),
    }
    if self.has_window(layer):
      attention.update(self.window_attention or {})
    if self.positions == 'rotary':
      attention['with_rotary'] = True
    attention.update(fields.pop('attention', {}))
    return TransformerBlock(
      num_heads=self.num_heads,
      mixer=self.mixer,
      hidden_size=self.hidden_size,
      norm=self.norm,
      norm_kind=self.norm_kind,
      norm_epsilon=self.norm_epsilon,
      activation=self.activation,
      with_feed_forward_bias=self.with_feed_forward_bias,
      experts=self.experts,
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

  def mask(self, layer: int, whole: Mask, *, is_causal: bool = False) -> Mask:
    """The mask of that layer's self-attention: `whole` and its window."""
    if not self.has_window(layer):
      return whole
    reach = self.window - 1
    return whole & Mask.window(reach, 0 if is_causal else reach)

  @hk.transparent
  def position_bias(self, *, is_causal: bool, name: str = 'position_bias'):
    """The bias of self-attention in all layers, or None."""
    return position_bias(
      self.positions, self.num_heads, is_causal=is_causal, name=name
    )

  @hk.transparent
  def final_norm(self, x, name: str = 'final_norm'):
    """Normalises the output of the last block, unless blocks do."""
    if self.norm == 'post':
      return x
    return NORMS[self.norm_kind](name=name, epsilon=self.norm_epsilon)(x)
