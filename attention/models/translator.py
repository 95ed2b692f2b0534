"""Encoder and decoder: the Transformer (Vaswani et al. 2017)."""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.layers import Embed, LayerNorm, Linear, add, dropout
from attention.modules.transformer import TransformerBlock
from attention.ops.cache import Cache, CrossCache
from attention.ops.masks import Mask
from attention.ops.positions import sinusoidal


@dataclasses.dataclass(kw_only=True, eq=False)
class Translator(hk.Module):
  """Logits of the target's tokens, given the source and those before.

  The source is tokens, or vectors of any kind: frames of sound, patches.
  """

  vocab_size: int
  num_layers: int  # of the encoder, and as many of the decoder
  num_heads: int
  model_size: int
  hidden_size: int | None = None  # of feed-forward; 4 × model_size by default
  source: str = 'tokens'  # or 'vectors'
  positions: str = 'sinusoidal'  # or 'learned'
  context_size: int = 512  # positions, where they are learned
  norm: str = 'pre'  # or 'post', see TransformerBlock
  activation: str = 'relu'
  dropout_rate: float = 0.0
  with_shared_embeddings: bool = True  # one table for source and target
  with_tied_output: bool = True  # output weights are the target's table
  attention: dict | None = None  # further fields of MultiHeadAttention
  name: str | None = None

  def __call__(
    self, source, tokens, lengths, *, cache=None, is_training: bool = False
  ):
    """Logits of the token after each position of the target.

    Args:
      source: [b, k] ids, or [b, k, c] vectors; None where the cache has it.
      tokens: [b, t] ids of the target, from its start.
      lengths: [b] of the sources; what is behind them is padding.
      cache: an empty `Cache` that each layer begins with, or what this gave for
        the tokens before.
      is_training: whether to drop.

    Returns:
      [b, t, vocab_size] float32; with a cache, a pair of that and the cache
      after the tokens.

    Raises:
      ValueError: a choice that isn't known, a source that isn't of the kind
        told, or more positions than are learned.
    """
    self._check(source)
    source_table, target_table = self._tables()
    memory_mask = Mask.lengths(key_lengths=lengths)
    memory = None
    if source is not None:
      x = self._embed(source_table, source, 'source', None, is_training)
      for i in range(self.num_layers):
        x = self._block(f'encoder_{i}')(
          x, mask=memory_mask, is_training=is_training
        )
      memory = self._finish(x, 'encoder')

    if isinstance(cache, Cache):
      layer = {'attention': cache, 'cross_attention': CrossCache()}
      cache = (layer,) * self.num_layers
    first = None if cache is None else cache[0]['attention']
    x = self._embed(target_table, tokens, 'target', first, is_training)
    after = []
    for i, cached in enumerate(cache or (None,) * self.num_layers):
      x = self._block(f'decoder_{i}')(
        x,
        memory,
        mask=Mask.causal(),
        context_mask=memory_mask,
        cache=cached,
        is_training=is_training,
      )
      if cached is not None:
        x, cached = x
        after.append(cached)
    logits = self._logits(self._finish(x, 'decoder'), target_table)
    return logits if cache is None else (logits, tuple(after))

  @hk.transparent
  def _block(self, name):
    return TransformerBlock(
      num_heads=self.num_heads,
      hidden_size=self.hidden_size,
      norm=self.norm,
      activation=self.activation,
      dropout_rate=self.dropout_rate,
      attention=self.attention,
      name=name,
    )

  @hk.transparent
  def _finish(self, x, name):
    return LayerNorm(f'{name}_norm')(x) if self.norm == 'pre' else x

  @hk.transparent
  def _tables(self):
    """Embeddings of the source (None for vectors) and the target."""

    def table(name):
      return Embed(
        self.vocab_size,
        self.model_size,
        w_init=hk.initializers.RandomNormal(self.model_size**-0.5),
        name=name,
      )

    if self.source == 'vectors':
      return None, table('target_tokens')
    if self.with_shared_embeddings:
      shared = table('tokens')
      return shared, shared
    return table('source_tokens'), table('target_tokens')

  @hk.transparent
  def _embed(self, table, inputs, side, cache, is_training):
    if table is None:
      x = Linear(self.model_size, name=f'{side}_vectors')(inputs)
    else:
      x = table(inputs) * math.sqrt(self.model_size)
    codes = self._positions(side, x.shape[-2], cache)
    x = dropout(add(x, codes), self.dropout_rate, is_training)
    # One array, for every layer to read: see TransformerBlock.
    return jax.lax.optimization_barrier(x)

  @hk.transparent
  def _positions(self, side, count, cache):
    """Codes of the next `count` positions, [count, m] or [b, count, m]."""
    length = count if cache is None else cache.capacity
    if self.positions == 'sinusoidal':
      codes = sinusoidal(length, self.model_size)
    elif length > self.context_size:
      raise ValueError(
        f'{side}: expected at most context_size={self.context_size} positions, '
        f'got {length}'
      )
    else:
      codes = hk.get_parameter(
        f'{side}_positions',
        (self.context_size, self.model_size),
        init=hk.initializers.RandomNormal(0.02),
      )
    return codes[:length] if cache is None else codes[cache.positions(count)]

  @hk.transparent
  def _logits(self, x, table):
    if self.with_tied_output:
      logits = x @ table.embeddings.T
    else:
      logits = Linear(self.vocab_size, with_bias=False, name='output')(x)
    return logits.astype(jnp.float32)

  def _check(self, source):
    for field, known in (
      ('source', ('tokens', 'vectors')),
      ('positions', ('sinusoidal', 'learned')),
    ):
      if getattr(self, field) not in known:
        raise ValueError(
          f'{field}: expected one of {known}, got {getattr(self, field)!r}'
        )
    if self.model_size % self.num_heads:
      raise ValueError(
        f'num_heads: expected a divisor of model_size={self.model_size}, '
        f'got {self.num_heads}'
      )
    expected = 2 if self.source == 'tokens' else 3
    if source is not None and source.ndim != expected:
      raise ValueError(
        f'source: expected {self.source} of rank {expected}, got shape '
        f'{source.shape}'
      )
