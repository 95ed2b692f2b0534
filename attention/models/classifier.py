"""A Transformer encoder that classifies sequences."""

import dataclasses
import math

import haiku as hk
import jax.numpy as jnp

from attention.models.transformer import Transformer
from attention.modules.fields import check_choice
from attention.modules.layers import Embed, Linear
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class Classifier(Transformer):
  """Class logits of sequences of tokens or vectors."""

  num_classes: int
  context_size: int  # the longest input
  vocab_size: int | None = None  # of tokens; None: inputs are vectors
  pooling: str = 'mean'  # over positions; 'first': of a learned first token

  def __call__(self, inputs, lengths=None, *, is_training: bool = False):
    """Computes the logits of the classes.

    Args:
      inputs: [b, t] token ids, or [b, t, c] vectors; t up to context_size.
      lengths: [b] ints; positions from there on are padding. None: no padding.
      is_training: whether to apply dropout.

    Returns:
      [b, num_classes] float32.

    Raises:
      ValueError: more positions than context_size, a field with an impossible
        value, or pooling='first' with a causal mixer.
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
    # Codes of the size of the embeddings.
    scale = 1.0 if self.vocab_size is None else 0.02 * math.sqrt(2)
    x = self.add_positions(x, self.context_size, is_training, scale=scale)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    if self.pooling == 'first':
      first = hk.get_parameter('first', (self.model_size,), x.dtype, init)
      first = jnp.broadcast_to(first, (batch, 1, self.model_size))
      x, lengths = jnp.concatenate([first, x], axis=1), lengths + 1
    bias = self.position_bias(is_causal=False)
    is_real = Mask.lengths(key_lengths=lengths)
    for i in range(self.num_layers):
      x = self.block(f'block_{i}', i)(
        x,
        mask=self.mask(i, is_real),
        bias=bias,
        is_training=is_training,
      )
    x = self.final_norm(x)
    if self.pooling == 'first':
      x = x[:, 0]
    else:
      is_real = jnp.arange(x.shape[1]) < lengths[:, None]
      count = jnp.maximum(lengths, 1)[:, None].astype(x.dtype)
      x = jnp.where(is_real[..., None], x, 0).sum(1) / count
    return Linear(self.num_classes, w_init=init, name='output')(x).astype(
      jnp.float32
    )

  def _check(self, inputs):
    self.check()
    if inputs.shape[1] > self.context_size:
      raise ValueError(
        f'inputs: expected at most context_size={self.context_size} '
        f'positions, got {inputs.shape[1]}'
      )
    check_choice('pooling', self.pooling, ('mean', 'first'))
    if self.pooling == 'first' and self.mixer != 'attention':
      raise ValueError(
        f"pooling: expected 'mean' with the causal mixer={self.mixer!r}, whose "
        "first position depends on no other, got 'first'"
      )
