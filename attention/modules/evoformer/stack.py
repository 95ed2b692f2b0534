"""The Evoformer block and stack (Jumper et al. 2021, Suppl. Alg. 6).

Parameters have AlphaFold's names, so its published weights can be loaded; see
`attention.interop.alphafold`.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.evoformer.axial_attention import (
  MSAColumnAttention,
  MSAColumnGlobalAttention,
  MSARowAttentionWithPairBias,
  TriangleAttention,
)
from attention.modules.evoformer.products import (
  OuterProductMean,
  TriangleMultiplication,
)
from attention.modules.evoformer.transition import Transition
from attention.modules.layers import Stream
from attention.ops import meshes
from attention.ops.dropout import check_rate


@dataclasses.dataclass(kw_only=True, eq=False)
class EvoformerBlock(hk.Module):
  """An Evoformer block: residual updates of the alignment, then of the pairs.

  The defaults are AlphaFold's, for alignment width 256 and pair width 128.
  """

  num_msa_head: int = 8
  num_pair_head: int = 4
  num_outer_channel: int = 32  # in the outer product mean
  num_intermediate_channel: int = 128  # in triangle multiplication
  num_intermediate_factor: int | float = 4  # hidden width / width (transitions)
  is_extra_msa: bool = False  # use global attention along columns
  outer_first: bool = False  # outer product mean comes first (multimer)
  fuse_projection_weights: bool = False  # in triangle products (multimer)
  msa_dropout_rate: float = 0.15  # one mask for all rows
  pair_dropout_rate: float = 0.25  # one mask for all rows, or columns
  zero_init: bool = True  # initialise all updates to 0
  gating: bool = True  # False: attention without gates
  with_pair_bias: bool = True  # False: row attention does not read the pairs
  with_triangles: bool = True  # False: pairs without their triangle updates
  implementation: str | None = None  # see dot_product_attention
  remat: bool = True  # recompute in the backward pass to save memory
  mesh_axis: str | None = meshes.PAIRS  # divides rows; None: never
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
    """Apply the block.

    Args:
      msa_act: activations of the alignment [s, i, a], float32, bfloat16 or
        float16.
      pair_act: pair activations [i, i, a'].
      msa_mask: boolean [s, i], True = valid; all True by default.
      pair_mask: boolean [i, i]; all True by default.
      is_training: whether to apply dropout, which uses Haiku's RNG.

    Returns:
      The updated `msa_act` and `pair_act`, with unchanged shapes and dtypes.

    Raises:
      ValueError: If the shapes are incompatible, a mask is not boolean, or a
        dropout rate is outside [0, 1).
    """
    return self.update(msa_act, pair_act, msa_mask, pair_mask, is_training)

  @hk.transparent
  def update(self, msa_act, pair_act, msa_mask, pair_mask, is_training):
    """Apply the block with its layers in the caller's name scope."""
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
    common = dict(
      zero_init=self.zero_init, remat=self.remat, mesh_axis=self.mesh_axis
    )
    attention = dict(
      gating=self.gating, implementation=self.implementation, **common
    )
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
    triangles = [
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
    ]
    return [
      MSARowAttentionWithPairBias(
        **msa,
        with_pair_bias=self.with_pair_bias,
        name='msa_row_attention_with_pair_bias',
      ),
      MSAColumnGlobalAttention(**msa, name='msa_column_global_attention')
      if self.is_extra_msa
      else MSAColumnAttention(**msa, name='msa_column_attention'),
      Transition(**transition, axis=1, name='msa_transition'),
      OuterProductMean(
        output_size=pair_size,
        num_outer_channel=self.num_outer_channel,
        **common,
        name='outer_product_mean',
      ),
      *(triangles if self.with_triangles else []),
      Transition(**transition, name='pair_transition'),
    ]


@dataclasses.dataclass(kw_only=True, eq=False)
class EvoformerStack(EvoformerBlock):
  """A stack of Evoformer blocks, compiled once regardless of depth.

  Parameters are those of `EvoformerBlock` with a leading block axis. With
  `remat`, only the inputs of each block are stored for the backward pass.
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
    """Apply all blocks; see `EvoformerBlock`."""

    block = hk.transform_with_state(
      lambda *act: self.update(*act, msa_mask, pair_mask, is_training)
    )

    def init(rngs, *act):
      # Under jit, XLA removes everything but the parameters.
      return jax.jit(jax.vmap(block.init, (0, None, None)))(rngs, *act)

    def step(act, given):
      return block.apply(*given, *act)

    # hk.layer_stack would add its own name to the parameter paths. Only
    # interceptors create state.
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
  """Add the updates of a block's layers in order.

  Args:
    layers: row attention, column attention, transition and outer product mean
      of the alignment, then the pair layers in order. Each is called with
      activations and a mask.
    msa_act: [s, i, a].
    pair_act: [i, i, a'].
    msa_mask: [s, i].
    pair_mask: [i, i].
    outer_first: whether the outer product mean precedes the other layers.
    drop: a function (layer, update) -> update that applies dropout.

  Returns:
    The updated `msa_act` and `pair_act`.
  """
  row, column, transition, outer, *pair_layers = layers
  msa_stream, pair_stream = Stream(name='msa'), Stream(name='pair')

  def cut(act, axis=0):
    return meshes.cut(act, axis, row.mesh_axis)

  def add(act, layer, *inputs):
    return act + drop(layer, layer(*inputs))

  def add_in_turn(act, layers, mask, *inputs):
    for layer in layers:
      act = cut(act, layer.axis)  # as the layer cuts its update
      act = add(act, layer, act, mask, *inputs)
    return act

  def add_outer(pair_act, msa_act):
    return add(cut(pair_act), outer, cut(msa_act, outer.axis), msa_mask)

  msa_act, pair_act = msa_stream.before(msa_act), pair_stream.before(pair_act)
  if outer_first:
    pair_act = add_outer(pair_act, msa_act)
  msa_act = add_in_turn(msa_act, [row], msa_mask, cut(pair_act))
  msa_act = add_in_turn(msa_act, [column, transition], msa_mask)
  if not outer_first:
    pair_act = add_outer(pair_act, msa_act)
  pair_act = add_in_turn(pair_act, pair_layers, pair_mask)
  msa_act, pair_act = cut(msa_act), cut(pair_act)
  return msa_stream.after(msa_act), pair_stream.after(pair_act)


def drop_shared(rng, rate: float, axis: int | None, x):
  """Apply dropout to x, with one mask shared along `axis`."""
  check_rate(rate)
  shape = [1 if i == axis else n for i, n in enumerate(x.shape)]
  keep = jax.random.bernoulli(rng, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0)
