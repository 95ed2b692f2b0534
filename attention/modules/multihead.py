"""Multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

import dataclasses

import haiku as hk
import jax.numpy as jnp

from attention.modules.layers import Linear
from attention.ops.dot_product import dot_product_attention


@dataclasses.dataclass(kw_only=True, eq=False)
class MultiHeadAttention(hk.Module):
  """Queries, keys and values per head; attention; one output projection.

  Parameters are those of `hk.MultiHeadAttention`, so its checkpoints load:
  `query/{w,b}` (m, h·d), `key/{w,b}` (m, g·d), `value/{w,b}` (m, g·e) and
  `linear/{w,b}` (h·e, m); with `fused_qkv`, one `qkv/{w,b}` holds the first
  three side by side.
  """

  num_heads: int
  num_kv_heads: int | None = None  # key/value heads; num_heads by default
  key_size: int | None = None  # channels a head; width / num_heads by default
  value_size: int | None = None  # channels a value head; key_size by default
  model_size: int | None = None  # width of the output; the query's by default
  fused_qkv: bool = False  # one projection for query, key and value
  with_bias: bool = True  # biases of query, key and value projections
  with_output_bias: bool = True
  w_init: hk.initializers.Initializer | None = None
  output_w_init: hk.initializers.Initializer | None = None  # default: w_init
  dropout_rate: float = 0.0  # of attention weights, while training
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def __call__(
    self,
    query,
    key=None,
    value=None,
    *,
    mask=None,
    bias=None,
    is_training: bool = False,
  ):
    """Attends from `query` to `key`.

    Args:
      query: [*b, q, m].
      key: [*b, k, m']; `query` by default.
      value: [*b, k, m'']; `key` by default.
      mask: see `dot_product_attention`, as `bias`.
      bias: added to the logits.
      is_training: whether attention weights are dropped.

    Returns:
      [*b, q, model_size] in the dtype of `query`.

    Raises:
      ValueError: widths and heads that don't divide, or shapes that don't fit.
    """
    key = query if key is None else key
    value = key if value is None else value
    q, k, v = self._project(query, key, value)
    heads = self.attend(q, k, v, mask=mask, bias=bias, is_training=is_training)
    flat = heads.reshape(*heads.shape[:-2], -1)
    return Linear(
      query.shape[-1] if self.model_size is None else self.model_size,
      with_bias=self.with_output_bias,
      w_init=self.output_w_init or self.w_init,
      name='linear',
    )(flat)

  def attend(self, query, key, value, *, mask, bias, is_training):
    """softmax(query keyᵀ / √d) value: [*b, q, h, d] → [*b, q, h, e].

    All attention goes through here, for `hk.intercept_methods` to see.
    """
    is_dropping = is_training and self.dropout_rate > 0
    return dot_product_attention(
      query,
      key,
      value,
      mask=mask,
      bias=bias,
      dropout_rate=self.dropout_rate if is_dropping else 0.0,
      dropout_rng=hk.next_rng_key() if is_dropping else None,
      implementation=self.implementation,
    )

  @hk.transparent
  def _project(self, query, key, value):
    key_size, value_size = self._head_sizes(query.shape[-1])
    num_kv_heads = self.num_kv_heads or self.num_heads
    heads = (self.num_heads, num_kv_heads, num_kv_heads)
    sizes = (key_size, key_size, value_size)
    widths = [h * s for h, s in zip(heads, sizes, strict=True)]
    inputs = (query, key, value)
    if self.fused_qkv:
      outputs = self._project_fused(inputs, widths)
    else:
      outputs = [
        Linear(width, with_bias=self.with_bias, w_init=self.w_init, name=name)(
          x
        )
        for x, width, name in zip(
          inputs, widths, ('query', 'key', 'value'), strict=True
        )
      ]
    return [
      x.reshape(*x.shape[:-1], h, s)
      for x, h, s in zip(outputs, heads, sizes, strict=True)
    ]

  @hk.transparent
  def _project_fused(self, inputs, widths):
    """[q | k | v] in one product; in cross-attention, each its own slice."""
    sizes = {x.shape[-1] for x in inputs}
    if len(sizes) > 1:
      raise ValueError(
        'fused_qkv: expected query, key and value of one width, '
        f'got {[x.shape[-1] for x in inputs]}; set fused_qkv=False'
      )
    splits = [widths[0], widths[0] + widths[1]]
    qkv = Linear(
      sum(widths), with_bias=self.with_bias, w_init=self.w_init, name='qkv'
    )
    query, key, value = inputs
    if query is key and key is value:
      return jnp.split(qkv(query), splits, axis=-1)
    return [jnp.split(qkv(x), splits, axis=-1)[i] for i, x in enumerate(inputs)]

  def _head_sizes(self, width):
    num_kv_heads = self.num_kv_heads or self.num_heads
    if self.num_heads % num_kv_heads:
      raise ValueError(
        f'num_kv_heads: expected a divisor of num_heads={self.num_heads}, '
        f'got {num_kv_heads}'
      )
    if self.key_size is None and width % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of the width {width}, got '
        f'{self.num_heads}; change either, or set key_size'
      )
    key_size = self.key_size or width // self.num_heads
    return key_size, self.value_size or key_size
