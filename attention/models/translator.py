"""Encoder and decoder: the Transformer (Vaswani et al. 2017)."""

import dataclasses
import math

import haiku as hk
import jax.numpy as jnp

from attention.models.transformer import Transformer
from attention.modules.fields import check_choice
from attention.modules.layers import Embed, Linear
from attention.ops import products
from attention.ops.cache import Cache, CrossCache
from attention.ops.masks import Mask


@dataclasses.dataclass(kw_only=True, eq=False)
class Translator(Transformer):
  """Predicts the target's next token from the source and the tokens before it.

  The source is a sequence of tokens or of vectors, such as spectra or patches.
  Encoder and decoder have `num_layers` layers each.
  """

  vocab_size: int
  source: str = 'tokens'  # or 'vectors'
  positions: str = 'sinusoidal'  # see Transformer
  activation: str = 'relu'
  context_size: int = 512  # the longest input, where positions are learned
  with_shared_embeddings: bool = True  # one table for source and target
  with_tied_output: bool = True  # logits use the target's embeddings

  def __call__(
    self, source, tokens, lengths, *, cache=None, is_training: bool = False
  ):
    """Computes the logits of the token after each position of the target.

    Args:
      source: [b, k] ids or [b, k, c] vectors; None once the cache holds it.
      tokens: [b, t] ids of the target, starting with the start symbol.
      lengths: [b] lengths of the sources; positions from there on are padding.
      cache: an empty `Cache` for the first tokens, then the cache that the
        previous call returned.
      is_training: whether to apply dropout.

    Returns:
      [b, t, vocab_size] float32; with a cache, a pair of the logits and the new
      cache.

    Raises:
      ValueError: a field with an impossible value, a source of another kind, or
        more positions than the learned table has.
    """
    self._check(source)
    source_table, target_table = self._tables()
    is_real = Mask.lengths(key_lengths=lengths)
    memory = None
    if source is not None:
      x = self._embed(source_table, source, 'source', None, is_training)
      bias = self.position_bias(is_causal=False, name='encoder_position_bias')
      for i in range(self.num_layers):
        x = self.block(f'encoder_{i}', i)(
          x,
          mask=self.mask(i, is_real),
          bias=bias,
          is_training=is_training,
        )
      memory = self.final_norm(x, 'encoder_norm')

    if isinstance(cache, Cache):
      layer = {'attention': cache, 'cross_attention': CrossCache()}
      cache = (layer,) * self.num_layers
    first = None if cache is None else cache[0]['attention']
    x = self._embed(target_table, tokens, 'target', first, is_training)
    bias = self.position_bias(is_causal=True, name='decoder_position_bias')
    causal = Mask.causal()
    after = []
    for i, cached in enumerate(cache or (None,) * self.num_layers):
      x = self.block(f'decoder_{i}', i)(
        x,
        memory,
        mask=self.mask(i, causal, is_causal=True),
        bias=bias,
        context_mask=is_real,
        cache=cached,
        is_training=is_training,
      )
      if cached is not None:
        x, cached = x
        after.append(cached)
    logits = self._logits(self.final_norm(x, 'decoder_norm'), target_table)
    return logits if cache is None else (logits, tuple(after))

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
    length = x.shape[-2] if cache is None else cache.capacity
    if self.positions == 'learned' and length > self.context_size:
      raise ValueError(
        f'{side}: expected at most context_size={self.context_size} positions, '
        f'got {length}'
      )
    return self.add_positions(
      x,
      self.context_size,
      is_training,
      name=f'{side}_positions',
      cache=cache,
    )

  @hk.transparent
  def _logits(self, x, table):
    if self.with_tied_output:
      logits = products.dot(x, table.embeddings, is_transposed=True)
    else:
      logits = Linear(self.vocab_size, with_bias=False, name='output')(x)
    return logits.astype(jnp.float32)

  def _check(self, source):
    self.check()
    check_choice('source', self.source, ('tokens', 'vectors'))
    expected = 2 if self.source == 'tokens' else 3
    if source is not None and source.ndim != expected:
      raise ValueError(
        f'source: expected {self.source} of rank {expected}, got shape '
        f'{source.shape}'
      )
