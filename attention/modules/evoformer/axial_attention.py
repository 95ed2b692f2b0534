"""Attention along the axes of an alignment and of pairs (Suppl. 1.6).

Shapes use s for rows of the alignment, i and j for residues, and a for
channels.
"""

import dataclasses

import haiku as hk
import jax.numpy as jnp

from attention.modules.evoformer.arguments import check_mask
from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.layers import bind_layer_norm
from attention.ops import meshes
from attention.ops.mapping import map_rows


@dataclasses.dataclass(kw_only=True, eq=False)
class AxialAttention(hk.Module):
  """The base class of attention along either axis of [r, t, a]."""

  num_head: int = 8
  key_size: int | None = None  # channels per head; width / num_head by default
  value_size: int | None = None
  gating: bool = True
  zero_init: bool = True  # initialise the update to 0
  implementation: str | None = None  # see dot_product_attention
  remat: bool = True
  mesh_axis: str | None = meshes.PAIRS  # divides rows; None: never
  name: str | None = None

  @hk.transparent
  def _attend(self, act, mask, query_norm, bias=None, *, kind):
    """Self-attention within rows (or columns, axis 1) of [r, t, a]."""
    axis = self.axis
    attention = kind(
      num_head=self.num_head,
      key_size=self.key_size,
      value_size=self.value_size,
      gating=self.gating,
      zero_init=self.zero_init,
      implementation=self.implementation,
      name='attention',
    )
    weights = attention.weights(act, act)

    def rows(shared, x, mask):
      query_norm, weights, bias = shared
      x, mask = (jnp.moveaxis(y, axis, 0) for y in (x, mask))
      x = query_norm(x)
      if kind is GlobalAttention:
        update = attention.gated(weights, x, x, mask[..., None])
      else:
        update = attention.gated(weights, x, x, mask[:, None, None, :], bias)
      return jnp.moveaxis(update, 0, axis)

    return map_rows(
      rows,
      (query_norm, weights, bias),
      act,
      mask,
      axis=axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )

  @hk.transparent
  def _pair_bias(self, norm, pair_act):
    """Project normalised pairs to a bias: [q, k, a] → [h, q, k] float32.

    With axis 1 the pairs are [k, q, a].
    """
    shape = (pair_act.shape[-1], self.num_head)
    init = hk.initializers.RandomNormal(stddev=shape[0] ** -0.5)
    w = hk.get_parameter('feat_2d_weights', shape, pair_act.dtype, init)

    def rows(shared, x):
      norm, w = shared
      return jnp.matmul(norm(x), w, preferred_element_type=jnp.float32)

    shared = (norm, w.astype(pair_act.dtype))
    bias = map_rows(
      rows,
      shared,
      pair_act,
      axis=self.axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )
    return bias.transpose(2, self.axis, 1 - self.axis)


@dataclasses.dataclass(kw_only=True, eq=False)
class MSARowAttentionWithPairBias(AxialAttention):
  """Attention along each row of the alignment (Suppl. Alg. 7).

  Parameters: `query_norm`, `feat_2d_norm`, `feat_2d_weights` (a, h),
  `attention` (see `GatedAttention`).
  """

  axis = 0
  with_pair_bias: bool = True  # False: without `feat_2d_*`

  def __call__(self, msa_act, msa_mask, pair_act):
    """Compute the update of the alignment.

    Args:
      msa_act: activations of the alignment [s, i, a].
      msa_mask: boolean [s, i].
      pair_act: pair activations [i, i, a'].

    Returns:
      [s, i, a] in the dtype of `msa_act`.

    Raises:
      ValueError: If the shapes are incompatible or the mask is not boolean.
    """
    msa_mask = check_mask(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    bias = None
    if self.with_pair_bias:
      feat_2d_norm = bind_layer_norm('feat_2d_norm', pair_act)
      bias = self._pair_bias(feat_2d_norm, pair_act)
    return self._attend(
      msa_act, msa_mask, query_norm, bias, kind=GatedAttention
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class MSAColumnAttention(AxialAttention):
  """Attention along each column of the alignment (Suppl. Alg. 8).

  Parameters: `query_norm`, `attention` (see `GatedAttention`).
  """

  axis = 1

  def __call__(self, msa_act, msa_mask):
    """Compute the update; see `MSARowAttentionWithPairBias`."""
    msa_mask = check_mask(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    return self._attend(msa_act, msa_mask, query_norm, kind=GatedAttention)


@dataclasses.dataclass(kw_only=True, eq=False)
class MSAColumnGlobalAttention(AxialAttention):
  """Global attention along each column of the alignment (Suppl. Alg. 19).

  Parameters: `query_norm`, `attention` (see `GlobalAttention`).
  """

  axis = 1

  def __call__(self, msa_act, msa_mask):
    """Compute the update; see `MSARowAttentionWithPairBias`.

    Without gating, the update is the same for all rows and has shape [1, i, a].
    """
    msa_mask = check_mask(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    return self._attend(msa_act, msa_mask, query_norm, kind=GlobalAttention)


@dataclasses.dataclass(kw_only=True, eq=False)
class TriangleAttention(AxialAttention):
  """Triangle attention around a node (Suppl. Alg. 13 and 14).

  Parameters: `query_norm`, `feat_2d_weights` (a, h), `attention` (see
  `GatedAttention`).
  """

  orientation: str = 'per_row'  # starting node; 'per_column' for ending node
  num_head: int = 4

  @property
  def axis(self):
    return 1 if self.orientation == 'per_column' else 0

  def __call__(self, pair_act, pair_mask):
    """Compute the update of the pairs.

    Args:
      pair_act: pair activations [i, i, a].
      pair_mask: boolean [i, i].

    Returns:
      [i, i, a] in the dtype of `pair_act`.

    Raises:
      ValueError: If the shapes are incompatible, the mask is not boolean, or
        the orientation is unknown.
    """
    pair_mask = check_mask(pair_act, pair_mask, 'pair_act', 'pair_mask')
    if self.orientation not in ('per_row', 'per_column'):
      raise ValueError(
        "orientation: expected 'per_row' or 'per_column', got "
        f'{self.orientation!r}'
      )
    query_norm = bind_layer_norm('query_norm', pair_act)
    bias = self._pair_bias(query_norm, pair_act)
    return self._attend(
      pair_act, pair_mask, query_norm, bias, kind=GatedAttention
    )
