"""GPT: a decoder-only Transformer (Radford et al. 2019, "GPT-2").

Its fields cover the decoders of Llama, Mistral, Qwen, Gemma and gpt-oss too;
`attention.interop.transformers` reads their published files.
"""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from attention.models.transformer import Transformer
from attention.modules import fields
from attention.modules.layers import Embed, Linear
from attention.modules.lora import adapted
from attention.modules.stack import run_blocks
from attention.ops import products
from attention.ops.cache import Cache
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class GPT(Transformer):
  """Predicts the next token from all tokens before it.

  Initialised as GPT-2: normal(0.02), and 0.02/√(2 · num_layers) for the output
  projections of each block.
  """

  vocab_size: int
  context_size: int  # the longest input
  with_tied_output: bool = True  # logits use the token embeddings
  with_scaled_embeddings: bool = False  # times √model_size, as in Gemma
  output_logit_cap: float | None = None  # c · tanh(logits / c), as in Gemma 2
  fused_qkv: bool = True  # one projection for query, key and value
  use_scan: bool = False  # compile one block for all layers
  use_remat: bool = False  # recompute blocks in the backward pass
  lora: dict | None = None  # fields of `Lora`, low-rank updates

  @adapted
  def __call__(
    self,
    tokens,
    *,
    cache=None,
    num_logits: int | None = None,
    is_training: bool = False,
  ):
    """Computes the logits of the token after each position.

    Args:
      tokens: [b, t] ids in [0, vocab_size), t up to context_size.
      cache: an empty `Cache` for the first tokens, of a capacity up to
        context_size, then the cache that the previous call returned. Its window
        is that of the layers.
      num_logits: n, to compute the logits of the last n positions only.
      is_training: whether to apply dropout.

    Returns:
      [b, t, vocab_size] float32, or [b, n, vocab_size]; with a cache, a pair of
      the logits and the new cache.

    Raises:
      ValueError: more tokens than context_size, or a field with an impossible
        value.
    """
    self.check()
    if isinstance(cache, Cache):
      cache = tuple(
        {'attention': self._layer_cache(cache, i)}
        for i in range(self.num_layers)
      )
    first = None if cache is None else cache[0]['attention']
    length = tokens.shape[-1] if first is None else first.capacity
    if length > self.context_size:
      raise ValueError(
        f'tokens: expected at most context_size={self.context_size} '
        f'positions, got {length}'
      )
    init = hk.initializers.RandomNormal(0.02)
    residual_init = hk.initializers.RandomNormal(
      0.02 / math.sqrt(2 * self.num_layers)
    )
    token_table = Embed(
      self.vocab_size, self.model_size, w_init=init, name='tokens'
    )
    x = token_table(tokens)
    if self.with_scaled_embeddings:
      x = x * math.sqrt(self.model_size)
    x = self.add_positions(
      x,
      self.context_size,
      is_training,
      scale=0.02 * math.sqrt(2),  # of the size of the embeddings
      cache=first,
    )
    bias = self.position_bias(is_causal=True)
    causal = Mask.causal()
    layers, after = list(cache or ()), []

    def block(layer, x):
      module = self.block(
        f'block_{layer}',
        layer,
        w_init=init,
        output_w_init=residual_init,
        attention={'fused_qkv': self.fused_qkv},
      )
      mask = self.mask(layer, causal, is_causal=True)
      if cache is None:
        return module(x, mask=mask, bias=bias, is_training=is_training)
      x, cached = module(x, mask=mask, bias=bias, cache=layers.pop(0))
      after.append(cached)
      return x

    x = run_blocks(
      block,
      self.num_layers,
      x,
      use_scan=self.use_scan and cache is None,
      use_remat=self.use_remat and cache is None,
      period=len(self.window_pattern) if self.window else 1,
    )
    if num_logits is not None:
      fields.check_count('num_logits', num_logits)
      x = x[:, -num_logits:]
    x = self.final_norm(x)
    if self.with_tied_output:
      logits = products.dot(x, token_table.embeddings, is_transposed=True)
    else:
      logits = Linear(
        self.vocab_size, with_bias=False, w_init=init, name='output'
      )(x)
    logits = logits.astype(jnp.float32)
    if self.output_logit_cap is not None:
      cap = self.output_logit_cap
      logits = cap * jnp.tanh(logits / cap)
    return logits if cache is None else (logits, tuple(after))

  def _layer_cache(self, cache, layer: int):
    """The cache of a layer, which holds the keys that its window reaches."""
    window = self.window if self.has_window(layer) else None
    return dataclasses.replace(cache, window=window)


def window_step(apply, params, context_size: int, start=0):
  """A decoding step by a forward pass over the last `context_size` tokens.

  For models without a cache.

  Args:
    apply: (params, tokens [b, t]) -> logits [b, t, v].
    params: the model's parameters.
    context_size: the longest input.
    start: padding in front of the prompt, the same in all rows.

  Returns:
    (step, cache) for `attention.decoding`. The cache is (tokens
    [1, context_size], length) and broadcasts to any batch size.
  """

  def step(tokens, cache):
    window, length = cache
    window = jnp.broadcast_to(window, (tokens.shape[0], context_size))
    window = jnp.concatenate([window, tokens], axis=1)[:, -context_size:]
    length = jnp.minimum(length + tokens.shape[1], context_size)
    # The newest token is last in the window; the model counts from 0.
    inputs = jnp.roll(window, length, axis=1)
    logits = apply(params, inputs)
    last = jax.lax.dynamic_index_in_dim(logits, length - 1, 1, keepdims=False)
    return last, (window, length)

  return step, (jnp.zeros((1, context_size), jnp.int32), jnp.int32(0) - start)
