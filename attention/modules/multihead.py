"""Multi-head attention (Vaswani et al. 2017, section 3.2.2)."""

import dataclasses
import math

import haiku as hk
import jax.numpy as jnp

from attention.modules.fields import check_choice, check_count, hint
from attention.modules.layers import Linear, RMSNorm
from attention.ops import similarity
from attention.ops.attention_weights import attention_weights
from attention.ops.cache import Cache, CrossCache
from attention.ops.dot_product import additive_attention, dot_product_attention
from attention.ops.dropout import check_rate
from attention.ops.positions import Rotary, rotary

_COUNTS = 'num_heads', 'num_kv_heads', 'key_size', 'value_size', 'model_size'
SIMILARITIES = ('scaled_dot', 'dot', 'cosine', 'general', 'additive')
_ROTARY = [field.name for field in dataclasses.fields(Rotary)]
_KNOWN = {
  'similarity': SIMILARITIES,
  'value_factorisation': ('low_rank', 'full'),
}


@dataclasses.dataclass(kw_only=True, eq=False)
class MultiHeadAttention(hk.Module):
  """Multi-head attention: projections, attention, an output projection.

  The parameters are those of `hk.MultiHeadAttention`, so its checkpoints load:
  `query/{w,b}` (m, h·d), `key/{w,b}` (m, g·d), `value/{w,b}` (m, g·e) and
  `linear/{w,b}` (h·e, m). With `fused_qkv`, `qkv/{w,b}` concatenates the first
  three.

  Two similarities have a parameter `similarity_w`: a matrix (h, d, d) for
  'general', a vector (h, d) for 'additive'. `with_sinks` adds `sinks` (h). With
  `value_factorisation='full'` each head maps values to the full width,
  `value/{w,b}` (m, g·m); the heads are summed and there is no `linear`.
  """

  num_heads: int
  num_kv_heads: int | None = None  # key/value heads; num_heads by default
  key_size: int | None = None  # channels per head; width / num_heads by default
  value_size: int | None = None  # channels per value head; default: key_size
  model_size: int | None = None  # output width; the query's by default
  similarity: str = 'scaled_dot'  # or dot, cosine, general, additive
  scale: float | None = None  # of the logits; the similarity's by default
  logit_cap: float | None = None  # c · tanh(logits / c)
  with_qk_norm: bool = False  # RMS norm of each head's queries and keys
  qk_norm: dict | None = None  # fields of `RMSNorm`, of these norms
  with_rotary: bool = False  # rotary position codes on queries and keys
  rotary: dict | None = None  # fields of `Rotary`, of these codes
  with_sinks: bool = False  # a learned extra logit per head
  value_factorisation: str = 'low_rank'  # or 'full', see above
  fused_qkv: bool = False  # one projection for query, key and value
  with_bias: bool = True  # on the query, key and value projections
  with_output_bias: bool = True
  w_init: hk.initializers.Initializer | None = None
  output_w_init: hk.initializers.Initializer | None = None  # default: w_init
  dropout_rate: float = 0.0  # of attention weights, in training
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
    positions=None,
    cache=None,
    is_training: bool = False,
  ):
    """Attends from `query` to `key`.

    Args:
      query: [*b, q, m].
      key: [*b, k, m']; `query` by default.
      value: [*b, k, m'']; `key` by default.
      mask: as in `dot_product_attention`.
      bias: as in `dot_product_attention`.
      positions: [q] or [*b, q], for rotary codes: positions of the queries, and
        of the keys in self-attention. By default they start at 0, or after the
        tokens that the cache holds.
      cache: a `Cache` of the preceding tokens, for self-attention; or a
        `CrossCache`, which stores the projected `key` and `value` on the first
        call and replaces them afterwards.
      is_training: whether to apply dropout.

    Returns:
      [*b, q, model_size] in the dtype of `query`; with a cache, a pair of the
      output and the new cache.

    Raises:
      ValueError: a width that the number of heads does not divide, shapes that
        don't match, an unknown value of a field, or the wrong kind of cache.
    """
    self._check(positions, cache)
    is_cached = isinstance(cache, CrossCache) and cache.key is not None
    if isinstance(cache, CrossCache) and key is None and not is_cached:
      raise ValueError('key: expected a context, as the CrossCache is empty')
    is_self = key is None or key is query or isinstance(cache, Cache)
    key = query if key is None else key
    value = key if value is None else value
    model_size = self.model_size or query.shape[-1]
    if is_cached:
      q, _, _ = self._project(query, None, None, model_size)
      q, _ = self._encode(q, None, positions, is_self=False)
      k, v = cache.keys_and_values()
    else:
      q, k, v = self._project(query, key, value, model_size)
      if isinstance(cache, Cache) and self.with_rotary and positions is None:
        positions = cache.positions(query.shape[-2])
      q, k = self._encode(q, k, positions, is_self)
      if isinstance(cache, Cache):
        cache, (k, v, mask, bias) = cache.extend(k, v, mask, bias)
      elif cache is not None:
        cache = CrossCache.create(k, v)
    heads = self.attend(q, k, v, mask=mask, bias=bias, is_training=is_training)
    output = self._join(heads, model_size)
    return output if cache is None else (output, cache)

  @hk.transparent
  def _join(self, heads, model_size):
    """[*b, q, h, e] → [*b, q, m]."""
    if self.value_factorisation == 'full':
      return heads.sum(-2)
    flat = heads.reshape(*heads.shape[:-2], math.prod(heads.shape[-2:]))
    return Linear(
      model_size,
      with_bias=self.with_output_bias,
      w_init=self.output_w_init or self.w_init,
      name='linear',
    )(flat)

  def attend(self, query, key, value, *, mask, bias, is_training):
    """softmax(similarity(query, key)) value: [*b, q, h, d] → [*b, q, h, e].

    All attention goes through this method, so that `hk.intercept_methods` can
    observe it.
    """
    is_dropping = is_training and self.dropout_rate > 0
    query, key, arguments = self.compare(query, key)
    attention = (
      additive_attention if 'vector' in arguments else dot_product_attention
    )
    return attention(
      query,
      key,
      value,
      mask=mask,
      bias=bias,
      dropout_rate=self.dropout_rate if is_dropping else 0.0,
      dropout_rng=hk.next_rng_key() if is_dropping else None,
      implementation=self.implementation,
      **arguments,
    )

  def pattern(self, query, key, *, mask, bias, heads=None, queries=None):
    """The weights of `attend`: [*b, heads, queries, k], for `capture`."""
    query, key, arguments = self.compare(query, key)
    return attention_weights(
      query,
      key,
      mask=mask,
      bias=bias,
      heads=heads,
      queries=queries,
      **arguments,
    )

  @hk.transparent
  def compare(self, query, key):
    """Applies the similarity.

    Args:
      query: [*b, q, h, d].
      key: [*b, k, g, d].

    Returns:
      (query, key, further arguments) for `dot_product_attention`, or for
      `additive_attention` if they include `vector`.
    """
    logits = {}
    if self.logit_cap is not None:
      logits['logit_cap'] = self.logit_cap
    if self.with_sinks:
      logits['sinks'] = hk.get_parameter(
        'sinks', (self.num_heads,), jnp.float32, jnp.zeros
      )
    *_, num_heads, size = query.shape
    if self.similarity == 'additive':
      init = hk.initializers.RandomNormal(1 / math.sqrt(size))
      vector = hk.get_parameter(
        'similarity_w', (num_heads, size), query.dtype, init
      )
      scale = 1.0 if self.scale is None else self.scale
      return query, key, {'vector': vector, 'scale': scale, **logits}
    if self.similarity == 'general':
      # Initialised to the scaled dot product.
      weight = hk.get_parameter(
        'similarity_w',
        (num_heads, size, size),
        query.dtype,
        lambda shape, dtype: jnp.broadcast_to(
          jnp.eye(size, dtype=dtype) / math.sqrt(size), shape
        ),
      )
      query, key, scale = similarity.general(query, key, weight)
    else:
      query, key, scale = getattr(similarity, self.similarity)(query, key)
    scale = scale if self.scale is None else self.scale
    return query, key, {'scale': scale, **logits}

  @hk.transparent
  def _encode(self, query, key, positions, is_self):
    """Applies norms and rotary codes to queries and keys [*b, t, h, d]."""
    if self.with_qk_norm:
      fields = self.qk_norm or {}
      query = RMSNorm(name='query_norm', **fields)(query)
      key = None if key is None else RMSNorm(name='key_norm', **fields)(key)
    if self.with_rotary:
      if positions is None:
        positions = jnp.arange(query.shape[-3])
      kind = Rotary(**(self.rotary or {}))
      query = rotary(query, positions, kind=kind)
      if key is not None:
        of_keys = positions if is_self else jnp.arange(key.shape[-3])
        key = rotary(key, of_keys, kind=kind)
    return query, key

  def _check(self, positions, cache):
    check_rate(self.dropout_rate)
    for field in _COUNTS:
      check_count(field, getattr(self, field))
    for field, known in _KNOWN.items():
      check_choice(field, getattr(self, field), known)
    for key in self.rotary or {}:
      if key not in _ROTARY:
        raise ValueError(f'rotary.{key}: no such field{hint(key, _ROTARY)}')
    if self.value_factorisation == 'full' and self.value_size is not None:
      raise ValueError(
        "value_size: expected None with value_factorisation='full', where "
        f'values have the width of the output, got {self.value_size}'
      )
    if positions is not None and not self.with_rotary:
      raise ValueError(
        'positions: expected None without rotary codes; set with_rotary=True'
      )
    if not isinstance(cache, Cache | CrossCache | None):
      raise ValueError(
        f'cache: expected a Cache or a CrossCache, got {type(cache).__name__}'
      )

  @hk.transparent
  def _project(self, query, key, value, model_size):
    key_size, value_size = self._head_sizes(query.shape[-1], model_size)
    num_kv_heads = self.num_kv_heads or self.num_heads
    heads = (self.num_heads, num_kv_heads, num_kv_heads)
    sizes = (key_size, key_size, value_size)
    widths = [h * s for h, s in zip(heads, sizes, strict=True)]
    inputs = (query, key, value)
    if self.fused_qkv:
      outputs = self._project_fused(inputs, widths)
    else:
      outputs = [
        None
        if x is None
        else Linear(
          width, with_bias=self.with_bias, w_init=self.w_init, name=name
        )(x)
        for x, width, name in zip(
          inputs, widths, ('query', 'key', 'value'), strict=True
        )
      ]
    return [
      None if x is None else x.reshape(*x.shape[:-1], h, s)
      for x, h, s in zip(outputs, heads, sizes, strict=True)
    ]

  @hk.transparent
  def _project_fused(self, inputs, widths):
    """One product for [q | k | v]; in cross-attention, a slice for each."""
    sizes = [x.shape[-1] for x in inputs if x is not None]
    if len({*sizes}) > 1:
      raise ValueError(
        'fused_qkv: expected query, key and value of one width, '
        f'got {sizes}; set fused_qkv=False'
      )
    splits = [widths[0], widths[0] + widths[1]]
    qkv = Linear(
      sum(widths), with_bias=self.with_bias, w_init=self.w_init, name='qkv'
    )
    query, key, value = inputs
    if query is key and key is value:
      return jnp.split(qkv(query), splits, axis=-1)
    return [
      None if x is None else jnp.split(qkv(x), splits, axis=-1)[i]
      for i, x in enumerate(inputs)
    ]

  def _head_sizes(self, width, model_size):
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
    if self.value_factorisation == 'full':
      return key_size, model_size
    return key_size, self.value_size or key_size
