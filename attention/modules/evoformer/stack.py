"""The Evoformer's block and stack (Jumper et al. 2021, Suppl. Alg. 6).

Parameters have AlphaFold's names, so its checkpoints load; see
`attention.interop.alphafold`.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.evoformer.layers import (
  MSAColumnAttention,
  MSAColumnGlobalAttention,
  MSARowAttentionWithPairBias,
  OuterProductMean,
  Transition,
  TriangleAttention,
  TriangleMultiplication,
)
from attention.ops.dropout import check_rate


@dataclasses.dataclass(kw_only=True, eq=False)
class EvoformerBlock(hk.Module):
  """One block: the alignment's layers, then the pairs', each a residual update.

  The defaults are AlphaFold's, for an alignment of width 256 and pairs of 128.
  """

  num_msa_head: int = 8
  num_pair_head: int = 4
  num_outer_channel: int = 32  # of the outer product mean
  num_intermediate_channel: int = 128  # of triangle multiplication
  num_intermediate_factor: int | float = 4  # of transitions
  is_extra_msa: bool = False  # global attention along columns
  outer_first: bool = False  # outer product mean before all else (multimer)
  fuse_projection_weights: bool = False  # of triangle multiplication (multimer)
  msa_dropout_rate: float = 0.15  # shared by rows
  pair_dropout_rate: float = 0.25  # shared by rows, or columns
  zero_init: bool = True  # all updates start at 0
  implementation: str | None = None  # see dot_product_attention
  remat: bool = True  # recompute in the backward pass, for memory's sake
  name: str | None = None

  def __call__(
    self,
    msa_act,
    pair_act,
    msa_mask=None,
    pair_mask=None,
    *,
    is_training: bool = False,
  ):
    """One block.

    Args:
      msa_act: [s, i, a] float32, bfloat16 or float16.
      pair_act: [i, i, a'].
      msa_mask: boolean [s, i], True = there; all by default.
      pair_mask: boolean [i, i].
      is_training: whether to drop, which takes keys from Haiku's.

    Returns:
      msa_act and pair_act, updated: same shapes, same dtypes.

    Raises:
      ValueError: shapes that don't fit, masks that aren't boolean, rates
        outside [0, 1).
    """
    return self.update(msa_act, pair_act, msa_mask, pair_mask, is_training)

  @hk.transparent
  def update(self, msa_act, pair_act, msa_mask, pair_mask, is_training):
    """`__call__`, its layers named as if they were the caller's."""
    for field in ('msa_dropout_rate', 'pair_dropout_rate'):
      check_rate(getattr(self, field), field)
    if msa_mask is None:
      msa_mask = jnp.ones(msa_act.shape[:2], bool)
    if pair_mask is None:
      pair_mask = jnp.ones(pair_act.shape[:2], bool)

    def drop(layer, update):
      rate = 0.0
      if layer.name == 'msa_row_attention_with_pair_bias':
        rate = self.msa_dropout_rate
      elif layer.name.startswith('triangle'):
        rate = self.pair_dropout_rate
      if not is_training or not rate:
        return update
      axis = 1 if layer.name == 'triangle_attention_ending_node' else 0
      return drop_shared(hk.next_rng_key(), rate, axis, update)

    return update_in_turn(
      self._layers(pair_act.shape[-1]),
      msa_act,
      pair_act,
      msa_mask,
      pair_mask,
      outer_first=self.outer_first,
      drop=drop,
    )

  @hk.transparent
  def _layers(self, pair_size):
    common = dict(zero_init=self.zero_init, remat=self.remat)
    attention = dict(implementation=self.implementation, **common)
    msa = dict(num_head=self.num_msa_head, **attention)
    pair = dict(num_head=self.num_pair_head, **attention)
    transition = dict(
      num_intermediate_factor=self.num_intermediate_factor, **common
    )
    product = dict(
      num_intermediate_channel=self.num_intermediate_channel,
      fuse_projection_weights=self.fuse_projection_weights,
      **common,
    )
    layers = [
      MSARowAttentionWithPairBias(
        **msa, name='msa_row_attention_with_pair_bias'
      ),
      MSAColumnGlobalAttention(**msa, name='msa_column_global_attention')
      if self.is_extra_msa
      else MSAColumnAttention(**msa, name='msa_column_attention'),
      Transition(**transition, name='msa_transition'),
      OuterProductMean(
        output_size=pair_size,
        num_outer_channel=self.num_outer_channel,
        **common,
        name='outer_product_mean',
      ),
      TriangleMultiplication(
        **product,
        equation='ikc,jkc->ijc',
        name='triangle_multiplication_outgoing',
      ),
      TriangleMultiplication(
        **product,
        equation='kjc,kic->ijc',
        name='triangle_multiplication_incoming',
      ),
      TriangleAttention(
        **pair,
        orientation='per_row',
        name='triangle_attention_starting_node',
      ),
      TriangleAttention(
        **pair,
        orientation='per_column',
        name='triangle_attention_ending_node',
      ),
      Transition(**transition, name='pair_transition'),
    ]
    return layers


@dataclasses.dataclass(kw_only=True, eq=False)
class EvoformerStack(EvoformerBlock):
  """Blocks one after another, compiled once, whatever their number.

  Parameters are those of `EvoformerBlock` with a leading axis of blocks. With
  `remat` only the inputs of each block are kept for the backward pass.
  """

  num_blocks: int = 48

  def __call__(
    self,
    msa_act,
    pair_act,
    msa_mask=None,
    pair_mask=None,
    *,
    is_training: bool = False,
  ):
    """All blocks; see `EvoformerBlock`."""

    block = hk.transform_with_state(
      lambda *act: self.update(*act, msa_mask, pair_mask, is_training)
    )

    def init(rngs, *act):
      # Jitted, so that nothing is computed but parameters.
      return jax.jit(jax.vmap(block.init, (0, None, None)))(rngs, *act)

    def step(act, given):
      return block.apply(*given, *act)

    # hk.layer_stack does the same, but puts a name of its own into the paths.
    # There is no state but what interceptors leave.
    lifted, updater = hk.transparent_lift_with_state(init)
    act = (msa_act, pair_act)
    params, state = lifted(self._rngs(), *act)
    step = jax.checkpoint(step, prevent_cse=False) if self.remat else step
    act, state = jax.lax.scan(step, act, (params, state, self._rngs()))
    updater.update(state)
    return act

  def _rngs(self):
    rng = hk.maybe_next_rng_key()
    return None if rng is None else jax.random.split(rng, self.num_blocks)


def update_in_turn(
  layers, msa_act, pair_act, msa_mask, pair_mask, *, outer_first, drop
):
  """Adds each layer's update, in the block's order.

  Args:
    layers: row attention, column attention, transition and outer product mean
      of the alignment, then the pairs' layers in order; each called with
      activations and mask.
    msa_act: [s, i, a].
    pair_act: [i, i, a'].
    msa_mask: [s, i].
    pair_mask: [i, i].
    outer_first: whether the outer product mean comes before the others.
    drop: called with a layer and its update, gives what is added.

  Returns:
    msa_act and pair_act, updated.
  """
  row, column, transition, outer, *pair_layers = layers

  def add(act, layer, *inputs):
    return act + drop(layer, layer(*inputs))

  if outer_first:
    pair_act = add(pair_act, outer, msa_act, msa_mask)
  msa_act = add(msa_act, row, msa_act, msa_mask, pair_act)
  for layer in (column, transition):
    msa_act = add(msa_act, layer, msa_act, msa_mask)
  if not outer_first:
    pair_act = add(pair_act, outer, msa_act, msa_mask)
  for layer in pair_layers:
    pair_act = add(pair_act, layer, pair_act, pair_mask)
  return msa_act, pair_act


def drop_shared(rng, rate: float, axis: int | None, x):
  """Drops entries of x with probability `rate`, the same all along `axis`."""
  check_rate(rate)
  shape = [1 if i == axis else n for i, n in enumerate(x.shape)]
  keep = jax.random.bernoulli(rng, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0)
