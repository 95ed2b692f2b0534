"""What the residual stream, and each part of it, says about the next token.

Logits are those before an `output_logit_cap`, which is not supported: the cap
is not linear, so that parts have no share of a capped logit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from attention.modules.fields import check_choice

_KINDS = ('layer', 'rms', 'zero_centred_rms', 'none')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FinalNorm:
  """The norm between the residual stream and the unembedding, in float32.

  A pytree of its arrays. The final norm of a model with `norm_kind='layer'` is
  `FinalNorm(**params['gpt/final_norm'])`, that of one with `norm='post'`, which
  has none, `FinalNorm(kind='none', scale=None)`.

  Raises:
    ValueError: an unknown kind.
  """

  # 'layer' (Ba et al. 2016), 'rms' (Zhang & Sennrich 2019), 'zero_centred_rms',
  # whose scale is stored as its difference from 1 (Gemma), or 'none'
  kind: str = dataclasses.field(default='layer', metadata={'static': True})
  scale: object  # [m], or None: not scaled
  offset: object = None  # [m], or None: 0
  # added to the variance, or to the mean of x²
  epsilon: float = dataclasses.field(default=1e-5, metadata={'static': True})

  def __post_init__(self):
    check_choice('kind', self.kind, _KINDS)

  def __call__(self, x):
    """The norm of x [..., m]: [..., m] float32."""
    y = self.linearised(x, x)
    if self.offset is None:
      return y
    return y + jnp.asarray(self.offset, jnp.float32)

  def linearised(self, parts, stream):
    """The norm as a linear map, its statistics fixed at those of the stream.

    For 'layer' (part - mean(part)) / √(variance(stream) + ε) · scale, for the
    others part / √(mean(stream²) + ε) · scale. Of parts whose sum is the
    stream, the results, plus the offset, sum to the norm of the stream.

    Args:
      parts: [..., *b, t, m].
      stream: [*b, t, m].

    Returns:
      [..., *b, t, m] float32, without the offset.
    """
    parts = jnp.asarray(parts, jnp.float32)
    stream = jnp.asarray(stream, jnp.float32)
    if self.kind == 'layer':
      parts = parts - parts.mean(-1, keepdims=True)
      stream = stream - stream.mean(-1, keepdims=True)
    if self.kind != 'none':
      squares = jnp.square(stream).mean(-1, keepdims=True)
      parts = parts * lax.rsqrt(squares + self.epsilon)
    if self.scale is None:
      return parts
    scale = jnp.asarray(self.scale, jnp.float32)
    return parts * (1 + scale if self.kind == 'zero_centred_rms' else scale)


def logit_lens(stream, unembedding, *, norm=None):
  """The logits that the model would give if its last layer ended here.

  nostalgebraist 2020, "Interpreting GPT: the logit lens". After the last block,
  these are the model's logits, before an `output_logit_cap`.

  Args:
    stream: [..., t, m], the residual stream anywhere.
    unembedding: [m, v]; with tied embeddings, their transpose.
    norm: the model's final norm, such as a `FinalNorm`, or None for none.

  Returns:
    [..., t, v] float32.

  Raises:
    ValueError: the unembedding does not match the stream.
  """
  stream = jnp.asarray(stream, jnp.float32)
  unembedding = jnp.asarray(unembedding, jnp.float32)
  width = stream.shape[-1]
  if unembedding.ndim != 2 or len(unembedding) != width:
    raise ValueError(
      f'unembedding: expected [m, v] with m = {width}, as in stream, '
      f'got shape {unembedding.shape}'
    )
  if norm is not None:
    stream = norm(stream)
  return jnp.matmul(stream, unembedding, precision='highest')


def direct_attribution(parts, stream, direction, *, norm: FinalNorm):
  """What each part of the residual stream adds to a logit.

  norm'(part) · direction, where norm' is the final norm with the statistics of
  the whole stream, which makes it linear: direct logit attribution (Elhage et
  al. 2021, "A Mathematical Framework for Transformer Circuits"). If the parts
  sum to the stream, the results, plus `direction @ norm.offset` where the norm
  has an offset, sum to the logit. An `output_logit_cap` is not supported; this
  is the logit before it.

  Args:
    parts: [..., *b, t, m]; outputs of heads and layers, embeddings, biases.
    stream: [*b, t, m], the input of the final norm.
    direction: [m] or [*b, t, m]: a column of the unembedding [m, v], or the
      difference of two for a difference of logits.
    norm: the model's final norm.

  Returns:
    [..., *b, t] float32.

  Raises:
    ValueError: shapes that do not match the stream's.
  """
  parts, stream, direction = (
    jnp.asarray(x, jnp.float32) for x in (parts, stream, direction)
  )
  if stream.ndim < 2:
    raise ValueError(f'stream: expected [*b, t, m], got shape {stream.shape}')
  if parts.shape[-stream.ndim :] != stream.shape:
    raise ValueError(
      f'parts: expected [..., *b, t, m] that ends in {stream.shape}, as in '
      f'stream, got shape {parts.shape}'
    )
  if direction.shape not in (stream.shape[-1:], stream.shape):
    raise ValueError(
      f'direction: expected shape {stream.shape[-1:]} or {stream.shape}, as in '
      f'stream, got {direction.shape}'
    )
  return (norm.linearised(parts, stream) * direction).sum(-1)
