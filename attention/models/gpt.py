"""GPT: a decoder-only Transformer (Radford et al. 2019, "GPT-2")."""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.layers import Embed, LayerNorm, Linear, add, dropout
from attention.modules.stack import run_blocks
from attention.modules.transformer import TransformerBlock
from attention.ops.cache import Cache
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class GPT(hk.Module):
  """Next-token logits from all tokens so far.

  Initialised as GPT-2 is: normal(0.02), and what each block adds to the
  residual scaled by 1/√(2 · num_layers).
  """

  vocab_size: int
  context_size: int  # positions in the table, the longest input
  num_layers: int
  num_heads: int
  model_size: int
  mixer: str = 'attention'  # or 'lstm', 'conv', for comparison
  dropout_rate: float = 0.0
  with_tied_output: bool = True  # output weights are the token table's
  fused_qkv: bool = True
  implementation: str | None = None  # see dot_product_attention
  use_scan: bool = False  # one block compiled for all layers
  use_remat: bool = False  # activations inside a block computed twice
  name: str | None = None

  def __call__(self, tokens, *, cache=None, is_training: bool = False):
    """Logits of the token after each position.

    Args:
      tokens: [b, t] ids in [0, vocab_size), t up to context_size.
      cache: an empty `Cache` that each layer begins with, or what this gave for
        the tokens before; its capacity is up to context_size.
      is_training: whether to drop.

    Returns:
      [b, t, vocab_size] float32; with a cache, a pair of that and the cache
      after the tokens.

    Raises:
      ValueError: t over context_size, no layers or heads, or a width not
        divisible by num_heads.
    """
    for field in ('num_layers', 'num_heads'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'{field}: expected 1 or more, got {getattr(self, field)}'
        )
    if isinstance(cache, Cache):
      cache = ({'attention': cache},) * self.num_layers
    first = None if cache is None else cache[0]['attention']
    length = tokens.shape[-1] if first is None else first.capacity
    if length > self.context_size:
      raise ValueError(
        f'tokens: expected at most context_size={self.context_size} '
        f'positions, got {length}'
      )
    if self.model_size % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of model_size={self.model_size}, '
        f'got {self.num_heads}'
      )
    init = hk.initializers.RandomNormal(0.02)
    residual_init = hk.initializers.RandomNormal(
      0.02 / math.sqrt(2 * self.num_layers)
    )
    token_table = Embed(
      self.vocab_size, self.model_size, w_init=init, name='tokens'
    )
    positions = hk.get_parameter(
      'positions', (self.context_size, self.model_size), init=init
    )
    if first is None:
      positions = positions[:length]
    else:
      positions = positions[first.positions(tokens.shape[-1])]
    x = add(token_table(tokens), positions)
    x = dropout(x, self.dropout_rate, is_training)
    # One array, for every layer to read: see TransformerBlock.
    x = jax.lax.optimization_barrier(x)
    layers, after = list(cache or ()), []

    def block(name, x):
      module = TransformerBlock(
        num_heads=self.num_heads,
        mixer=self.mixer,
        dropout_rate=self.dropout_rate,
        w_init=init,
        output_w_init=residual_init,
        attention={
          'fused_qkv': self.fused_qkv,
          'implementation': self.implementation,
        },
        name=name,
      )
      if cache is None:
        return module(x, mask=Mask.causal(), is_training=is_training)
      x, cached = module(x, mask=Mask.causal(), cache=layers.pop(0))
      after.append(cached)
      return x

    x = run_blocks(
      block,
      self.num_layers,
      x,
      use_scan=self.use_scan and cache is None,
      use_remat=self.use_remat and cache is None,
    )
    x = LayerNorm('final_norm')(x)
    if self.with_tied_output:
      logits = x @ token_table.embeddings.T
    else:
      logits = Linear(
        self.vocab_size, with_bias=False, w_init=init, name='output'
      )(x)
    logits = logits.astype(jnp.float32)
    return logits if cache is None else (logits, tuple(after))


def window_step(apply, params, context_size: int, start=0):
  """Decoding by a plain forward pass over the last `context_size` tokens.

  For layers that have no cache.

  Args:
    apply: (params, tokens [b, t]) -> logits [b, t, v].
    params: of the model.
    context_size: the longest input.
    start: how much padding all rows of the prompt begin with.

  Returns:
    (step, cache) for `attention.decoding`; the cache is made for a batch of
    one, of any batch by broadcasting: (tokens [1, context_size], length).
  """

  def step(tokens, cache):
    window, length = cache
    window = jnp.broadcast_to(window, (tokens.shape[0], context_size))
    window = jnp.concatenate([window, tokens], axis=1)[:, -context_size:]
    length = jnp.minimum(length + tokens.shape[1], context_size)
    # The window ends with the newest token; the model wants it from 0.
    inputs = jnp.roll(window, length, axis=1)
    logits = apply(params, inputs)
    last = jax.lax.dynamic_index_in_dim(logits, length - 1, 1, keepdims=False)
    return last, (window, length)

  return step, (jnp.zeros((1, context_size), jnp.int32), jnp.int32(0) - start)
