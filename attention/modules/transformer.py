"""The Transformer's block (Vaswani et al. 2017, figure 1)."""

import dataclasses

import haiku as hk
import jax

from attention.modules.layers import LayerNorm, Linear, dropout
from attention.modules.mixers import MIXERS
from attention.modules.multihead import MultiHeadAttention

_ACTIVATIONS = {'relu': jax.nn.relu, 'gelu': jax.nn.gelu}


@dataclasses.dataclass(kw_only=True, eq=False)
class TransformerBlock(hk.Module):
  """Self-attention, cross-attention if given a context, and feed-forward.

  Each sublayer is added to its input: `x + sublayer(norm(x))` if `norm` is
  'pre' (GPT-2), `norm(x + sublayer(x))` if 'post' (Vaswani et al. 2017).
  """

  num_heads: int
  mixer: str = 'attention'  # or, in place of self-attention, 'lstm' or 'conv'
  hidden_size: int | None = None  # of the feed-forward; 4 × width by default
  norm: str = 'pre'  # 'pre' or 'post'
  activation: str = 'gelu'  # 'gelu' or 'relu'
  dropout_rate: float = 0.0  # of each sublayer's output and the weights
  w_init: hk.initializers.Initializer | None = None
  output_w_init: hk.initializers.Initializer | None = None  # of what is added
  attention: dict | None = None  # further fields of MultiHeadAttention
  name: str | None = None

  def __call__(
    self,
    x,
    context=None,
    *,
    mask=None,
    context_mask=None,
    cache: dict | None = None,
    is_training: bool = False,
  ):
    """One block.

    Args:
      x: [*b, t, m].
      context: [*b, k, m'] for cross-attention, or None for no such layer.
      mask: of self-attention, see `dot_product_attention`; other mixers look
        back only, whatever it says.
      context_mask: of cross-attention.
      cache: {'attention': `Cache`}, with 'cross_attention': `CrossCache` where
        there is such a layer; once that is filled, `context` may be None.
      is_training: whether to drop.

    Returns:
      [*b, t, m]; with a cache, a pair of that and the cache after it.

    Raises:
      ValueError: unknown norm, activation or mixer, a width not divisible by
        heads, or a cache of other layers.
    """
    for field, known in (
      ('norm', ('pre', 'post')),
      ('activation', tuple(_ACTIVATIONS)),
      ('mixer', ('attention', *MIXERS)),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f'{field}: expected one of {known}, got {getattr(self, field)!r}'
        )

    def attention(name):
      return MultiHeadAttention(
        num_heads=self.num_heads,
        dropout_rate=self.dropout_rate,
        w_init=self.w_init,
        output_w_init=self.output_w_init,
        name=name,
        **(self.attention or {}),
      )

    names = {'attention', 'cross_attention'}
    if cache is not None and not {'attention'} <= cache.keys() <= names:
      raise ValueError(
        "cache: expected 'attention', and 'cross_attention' where there is "
        f'such a layer, got {sorted(cache)}'
      )
    cached = dict(cache or {})
    further = {}
    if 'cross_attention' in cached and (self.attention or {}).get(
      'with_rotary'
    ):
      further = {'positions': cached['attention'].positions(x.shape[-2])}

    def attend(y, name, *inputs, **arguments):
      layer = cached.get(name)
      y = attention(name)(
        y, *inputs, cache=layer, is_training=is_training, **arguments
      )
      if layer is not None:
        y, cached[name] = y
      return y

    def mix(y):
      if self.mixer not in MIXERS:
        return attend(y, 'attention', mask=mask)
      if cached:
        raise ValueError(
          f"cache: mixer {self.mixer!r} has none, only 'attention'"
        )
      return MIXERS[self.mixer](w_init=self.w_init, name=self.mixer)(y)

    x = self._add(x, self.mixer, mix, is_training)
    if context is not None or 'cross_attention' in cached:
      x = self._add(
        x,
        'cross_attention',
        lambda y: attend(
          y, 'cross_attention', context, mask=context_mask, **further
        ),
        is_training,
      )
    x = self._add(x, 'feed_forward', self._feed_forward, is_training)
    return x if cache is None else (x, cached)

  @hk.transparent
  def _add(self, x, name, sublayer, is_training):
    norm = LayerNorm(f'{name}_norm')
    y = sublayer(norm(x) if self.norm == 'pre' else x)
    x = x + dropout(y, self.dropout_rate, is_training)
    # Kept as an array: XLA on CPU would add up all earlier layers anew inside
    # every kernel that reads the sum.
    x = jax.lax.optimization_barrier(x)
    return x if self.norm == 'pre' else norm(x)

  @hk.transparent
  def _feed_forward(self, x):
    hidden = self.hidden_size or 4 * x.shape[-1]
    h = Linear(hidden, w_init=self.w_init, name='expand')(x)
    return Linear(
      x.shape[-1], w_init=self.output_w_init or self.w_init, name='contract'
    )(_ACTIVATIONS[self.activation](h))
