"""The Transformer block (Vaswani et al. 2017, figure 1)."""

import dataclasses

import haiku as hk
import jax

from attention.modules.experts import Experts
from attention.modules.fields import check_choice
from attention.modules.layers import NORMS, Linear, Stream, dropout
from attention.modules.mixers import MIXERS
from attention.modules.multihead import MultiHeadAttention

_ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': jax.nn.gelu,
  'silu': jax.nn.silu,
  'geglu': jax.nn.gelu,
  'swiglu': jax.nn.silu,
}
_GATED = ('geglu', 'swiglu')
_PLACES = ('pre', 'post', 'both')


@dataclasses.dataclass(kw_only=True, eq=False)
class TransformerBlock(hk.Module):
  """Self-attention, optional cross-attention and a feed-forward layer.

  Each sublayer has a residual connection: `x + sublayer(norm(x))` where `norm`
  is 'pre' (GPT-2), `norm(x + sublayer(x))` where it is 'post' (Vaswani et al.
  2017), `x + post_norm(sublayer(norm(x)))` where it is 'both' (Gemma 2).

  The feed-forward layer is `contract(activation(expand(x)))`. The gated
  activations 'geglu' and 'swiglu' compute
  `contract(activation(gate(x)) * expand(x))` (Shazeer 2020) with a hidden width
  of 8/3 times the model's, so that the number of parameters stays the same.
  With `experts`, a mixture replaces this layer.
  """

  num_heads: int
  mixer: str = 'attention'  # what replaces self-attention: 'lstm' or 'conv'
  hidden_size: int | None = None  # feed-forward width; 4 × model width
  norm: str = 'pre'  # or 'post', 'both'
  norm_kind: str = 'layer'  # or 'rms', 'zero_centred_rms'
  norm_epsilon: float = 1e-5  # added to the variance
  activation: str = 'gelu'  # or 'relu', 'silu', 'geglu', 'swiglu'
  with_feed_forward_bias: bool = True
  experts: dict | None = None  # fields of Experts
  dropout_rate: float = 0.0  # of sublayer outputs and attention weights
  w_init: hk.initializers.Initializer | None = None
  output_w_init: hk.initializers.Initializer | None = None  # of output layers
  attention: dict | None = None  # further fields of MultiHeadAttention
  name: str | None = None

  def __call__(
    self,
    x,
    context=None,
    *,
    mask=None,
    bias=None,
    context_mask=None,
    cache: dict | None = None,
    is_training: bool = False,
  ):
    """Applies the block.

    Args:
      x: [*b, t, m].
      context: [*b, k, m'] to attend to, or None for no cross-attention.
      mask: of self-attention, as in `dot_product_attention`. Other mixers
        ignore it; they are causal.
      bias: of self-attention, as in `dot_product_attention`.
      context_mask: of cross-attention.
      cache: {'attention': `Cache`}, and 'cross_attention': `CrossCache` where
        the block has cross-attention; once that is filled, `context` may be
        None.
      is_training: whether to apply dropout.

    Returns:
      [*b, t, m]; with a cache, a pair of the output and the new cache.

    Raises:
      ValueError: an unknown norm, activation or mixer, a width not divisible by
        the number of heads, or a cache for other layers.
    """
    check_choice('norm', self.norm, _PLACES)
    check_choice('norm_kind', self.norm_kind, NORMS)
    check_choice('activation', self.activation, _ACTIVATIONS)
    check_choice('mixer', self.mixer, ('attention', *MIXERS))

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
        "cache: expected the key 'attention', and 'cross_attention' for a "
        f'block with cross-attention, got {sorted(cache)}'
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
        return attend(y, 'attention', mask=mask, bias=bias)
      if cached:
        raise ValueError(
          f"cache: expected mixer='attention', got {self.mixer!r}, which has "
          'no cache'
        )
      return MIXERS[self.mixer](w_init=self.w_init, name=self.mixer)(y)

    stream = Stream(name='stream')
    x = stream.before(x)
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
    x = stream.after(x)
    return x if cache is None else (x, cached)

  @hk.transparent
  def _add(self, x, name, sublayer, is_training):
    def norm(name, x):
      return NORMS[self.norm_kind](name=name, epsilon=self.norm_epsilon)(x)

    y = sublayer(x if self.norm == 'post' else norm(f'{name}_norm', x))
    if self.norm == 'both':
      y = norm(f'{name}_post_norm', y)
    x = x + dropout(y, self.dropout_rate, is_training)
    # Materialises the sum. XLA on CPU would otherwise recompute the sums of all
    # earlier layers inside every kernel that reads it.
    x = jax.lax.optimization_barrier(x)
    return norm(f'{name}_norm', x) if self.norm == 'post' else x

  @hk.transparent
  def _feed_forward(self, x):
    if self.experts:
      return Experts(
        w_init=self.w_init,
        output_w_init=self.output_w_init,
        name='experts',
        **self.experts,
      )(x)
    width = x.shape[-1]
    is_gated = self.activation in _GATED
    hidden = self.hidden_size or (8 * width // 3 if is_gated else 4 * width)
    activation = _ACTIVATIONS[self.activation]

    def project(x, name, size, w_init):
      with_bias = self.with_feed_forward_bias
      return Linear(size, with_bias=with_bias, w_init=w_init, name=name)(x)

    h = project(x, 'expand', hidden, self.w_init)
    if is_gated:
      h = h * activation(project(x, 'gate', hidden, self.w_init))
    else:
      h = activation(h)
    return project(h, 'contract', width, self.output_w_init or self.w_init)
