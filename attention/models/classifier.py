"""A Transformer encoder that tells what a sequence is."""

import dataclasses

import haiku as hk
import jax.numpy as jnp

from attention.modules.layers import Embed, LayerNorm, Linear, add, dropout
from attention.modules.transformer import TransformerBlock
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class Classifier(hk.Module):
  """Logits of a sequence's class, from tokens or from vectors."""

  num_classes: int
  context_size: int  # positions in the table, the longest input
  num_layers: int
  num_heads: int
  model_size: int
  vocab_size: int | None = None  # of tokens; None: inputs are vectors
  pooling: str = 'mean'  # over positions; 'first': of a learned first token
  mixer: str = 'attention'  # or 'lstm', 'conv', for comparison
  dropout_rate: float = 0.0
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def __call__(self, inputs, lengths=None, *, is_training: bool = False):
    """Logits.

    Args:
      inputs: [b, t] token ids, or [b, t, c] vectors; t up to context_size.
      lengths: [b] ints: what stands behind them is padding; all of t by
        default.
      is_training: whether to drop.

    Returns:
      [b, num_classes] float32.

    Raises:
      ValueError: t over context_size, a width not divisible by num_heads,
        unknown pooling, or 'first' with a mixer that only looks back.
    """
    self._check(inputs)
    init = hk.initializers.RandomNormal(0.02)
    if self.vocab_size is None:
      x = Linear(self.model_size, name='inputs')(inputs)
    else:
      x = Embed(self.vocab_size, self.model_size, w_init=init, name='tokens')(
        inputs
      )
    batch, length = inputs.shape[:2]
    positions = hk.get_parameter(
      'positions', (self.context_size, self.model_size), x.dtype, init
    )
    x = add(x, positions[:length])
    lengths = jnp.full(batch, length) if lengths is None else lengths
    if self.pooling == 'first':
      first = hk.get_parameter('first', (self.model_size,), x.dtype, init)
      first = jnp.broadcast_to(first, (batch, 1, self.model_size))
      x, lengths = jnp.concatenate([first, x], axis=1), lengths + 1
    x = dropout(x, self.dropout_rate, is_training)
    for i in range(self.num_layers):
      x = TransformerBlock(
        num_heads=self.num_heads,
        mixer=self.mixer,
        dropout_rate=self.dropout_rate,
        attention={'implementation': self.implementation},
        name=f'block_{i}',
      )(x, mask=Mask.lengths(key_lengths=lengths), is_training=is_training)
    x = LayerNorm('final_norm')(x)
    if self.pooling == 'first':
      x = x[:, 0]
    else:
      is_there = jnp.arange(x.shape[1]) < lengths[:, None]
      count = jnp.maximum(lengths, 1)[:, None].astype(x.dtype)
      x = jnp.where(is_there[..., None], x, 0).sum(1) / count
    return Linear(self.num_classes, w_init=init, name='output')(x).astype(
      jnp.float32
    )

  def _check(self, inputs):
    if inputs.shape[1] > self.context_size:
      raise ValueError(
        f'inputs: expected at most context_size={self.context_size} '
        f'positions, got {inputs.shape[1]}'
      )
    if self.model_size % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of model_size={self.model_size}, '
        f'got {self.num_heads}'
      )
    if self.pooling not in ('mean', 'first'):
      raise ValueError(
        f"pooling: expected 'mean' or 'first', got {self.pooling!r}"
      )
    if self.pooling == 'first' and self.mixer != 'attention':
      raise ValueError(
        "pooling: expected 'mean', as the first position sees nothing of the "
        f"others with mixer={self.mixer!r}, got 'first'"
      )
