"""The layers of the Evoformer (Jumper et al. 2021, Suppl. 1.6).

Letters: s rows of the alignment, i j residues, a c o channels. All layers work
on some rows at a time and compute what lies inside them anew in the backward
pass; `remat=False` keeps it instead.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.layers import bind_layer_norm, bind_linear
from attention.ops.mapping import map_rows


@dataclasses.dataclass(kw_only=True, eq=False)
class _AxialAttention(hk.Module):
  """What attention along an axis of [r, t, a] has, whatever the axis."""

  num_head: int = 8
  key_size: int | None = None  # channels a head; width / num_head by default
  value_size: int | None = None
  gating: bool = True
  zero_init: bool = True  # the update starts at 0
  implementation: str | None = None  # see dot_product_attention
  remat: bool = True
  name: str | None = None

  @hk.transparent
  def _attend(self, act, mask, query_norm, bias=None, *, axis, kind):
    """Each row (or column, axis 1) attends to itself: [r, t, a] → [r, t, a]."""
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
    )

  @hk.transparent
  def _pair_bias(self, norm, pair_act, axis=0):
    """norm(pairs) feat_2d_weights: [q, k, a] → [h, q, k] float32.

    With axis 1 the pairs are [k, q, a].
    """
    shape = (pair_act.shape[-1], self.num_head)
    init = hk.initializers.RandomNormal(stddev=shape[0] ** -0.5)
    w = hk.get_parameter('feat_2d_weights', shape, pair_act.dtype, init)

    def rows(shared, x):
      norm, w = shared
      return jnp.matmul(norm(x), w, preferred_element_type=jnp.float32)

    shared = (norm, w.astype(pair_act.dtype))
    bias = map_rows(rows, shared, pair_act, is_whole=not self.remat)
    return bias.transpose(2, axis, 1 - axis)


@dataclasses.dataclass(kw_only=True, eq=False)
class MSARowAttentionWithPairBias(_AxialAttention):
  """Attention along each row of the alignment (Suppl. Alg. 7).

  Parameters: `query_norm`, `feat_2d_norm`, `feat_2d_weights` (a, h),
  `attention` (see `GatedAttention`).
  """

  def __call__(self, msa_act, msa_mask, pair_act):
    """The update of the alignment.

    Args:
      msa_act: [s, i, a].
      msa_mask: boolean [s, i].
      pair_act: [i, i, a'].

    Returns:
      [s, i, a] in the dtype of `msa_act`.

    Raises:
      ValueError: shapes that don't fit, a mask that isn't boolean.
    """
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    feat_2d_norm = bind_layer_norm('feat_2d_norm', pair_act)
    bias = self._pair_bias(feat_2d_norm, pair_act)
    return self._attend(
      msa_act, msa_mask, query_norm, bias, axis=0, kind=GatedAttention
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class MSAColumnAttention(_AxialAttention):
  """Attention along each column of the alignment (Suppl. Alg. 8).

  Parameters: `query_norm`, `attention` (see `GatedAttention`).
  """

  def __call__(self, msa_act, msa_mask):
    """The update of the alignment: as `MSARowAttentionWithPairBias`."""
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    return self._attend(
      msa_act, msa_mask, query_norm, axis=1, kind=GatedAttention
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class MSAColumnGlobalAttention(_AxialAttention):
  """Global attention along each column of the alignment (Suppl. Alg. 19).

  Parameters: `query_norm`, `attention` (see `GlobalAttention`).
  """

  def __call__(self, msa_act, msa_mask):
    """The update of the alignment: as `MSARowAttentionWithPairBias`.

    Without gating it is the same for all rows: [1, i, a].
    """
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
    query_norm = bind_layer_norm('query_norm', msa_act)
    return self._attend(
      msa_act, msa_mask, query_norm, axis=1, kind=GlobalAttention
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class TriangleAttention(_AxialAttention):
  """Attention of pairs around a node (Suppl. Alg. 13 and 14).

  Parameters: `query_norm`, `feat_2d_weights` (a, h), `attention` (see
  `GatedAttention`).
  """

  orientation: str = 'per_row'  # starting node; 'per_column': ending node
  num_head: int = 4

  def __call__(self, pair_act, pair_mask):
    """The update of the pairs.

    Args:
      pair_act: [i, i, a].
      pair_mask: boolean [i, i].

    Returns:
      [i, i, a] in the dtype of `pair_act`.

    Raises:
      ValueError: shapes that don't fit, a mask that isn't boolean, an unknown
        orientation.
    """
    pair_mask = _check(pair_act, pair_mask, 'pair_act', 'pair_mask')
    if self.orientation not in ('per_row', 'per_column'):
      raise ValueError(
        "orientation: expected 'per_row' or 'per_column', got "
        f'{self.orientation!r}'
      )
    axis = 0 if self.orientation == 'per_row' else 1
    query_norm = bind_layer_norm('query_norm', pair_act)
    bias = self._pair_bias(query_norm, pair_act, axis)
    return self._attend(
      pair_act, pair_mask, query_norm, bias, axis=axis, kind=GatedAttention
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class Transition(hk.Module):
  """Two layers on each position, with ReLU between (Suppl. Alg. 9 and 15).

  Parameters: `input_layer_norm`, `transition1`, `transition2`.
  """

  num_intermediate_factor: int | float = 4  # hidden width / width
  zero_init: bool = True  # the update starts at 0
  remat: bool = True
  name: str | None = None

  def __call__(self, act, mask=None):
    """The update: [s, i, a] → [s, i, a]. As AlphaFold's it ignores the mask."""
    del mask
    width = act.shape[-1]
    hidden = int(width * self.num_intermediate_factor)
    layers = (
      bind_layer_norm('input_layer_norm', act),
      bind_linear('transition1', hidden, act, scale=2.0),
    )
    wide = jax.ShapeDtypeStruct((hidden,), act.dtype)
    layers += (bind_linear('transition2', width, wide, scale=_final(self)),)

    def rows(layers, x):
      norm, expand, contract = layers
      return contract(jax.nn.relu(expand(norm(x))))

    return map_rows(rows, layers, act, is_whole=not self.remat)


@dataclasses.dataclass(kw_only=True, eq=False)
class OuterProductMean(hk.Module):
  """Pairs out of the alignment: mean outer products (Suppl. Alg. 10).

  Parameters: `layer_norm_input`, `left_projection`, `right_projection`,
  `output_w` (c, c, o), `output_b` (o).
  """

  output_size: int  # width of the pairs
  num_outer_channel: int = 32  # channels before the outer product
  zero_init: bool = True  # the update starts at 0
  remat: bool = True
  name: str | None = None

  def __call__(self, act, mask):
    """The update of the pairs.

    Args:
      act: [s, i, a].
      mask: boolean [s, i].

    Returns:
      [i, i, o] in the dtype of `act`.

    Raises:
      ValueError: shapes that don't fit, a mask that isn't boolean.
    """
    mask = _check(act, mask, 'act', 'mask')
    c, o = self.num_outer_channel, self.output_size
    layers = (
      bind_layer_norm('layer_norm_input', act),
      bind_linear('left_projection', c, act),
      bind_linear('right_projection', c, act),
    )
    init = hk.initializers.VarianceScaling(2.0, 'fan_in')
    if self.zero_init:
      init = hk.initializers.Constant(0.0)
    w = hk.get_parameter('output_w', (c, c, o), act.dtype, init)
    b = hk.get_parameter('output_b', (o,), act.dtype, jnp.zeros)

    def project(layers, x, mask):
      norm, left, right = layers
      x = norm(x)
      return tuple(
        p(x) * mask[..., None].astype(x.dtype) for p in (left, right)
      )

    left, right = map_rows(project, layers, act, mask, is_whole=not self.remat)

    def rows(shared, left):
      right, w, b = shared
      outer = jnp.einsum('isc,sje->icje', left, right)
      return jnp.einsum('icje,ceo->ijo', outer, w) + b

    shared = (right, w.astype(act.dtype), b.astype(act.dtype))
    left = jnp.swapaxes(left, 0, 1)
    products = map_rows(rows, shared, left, is_whole=not self.remat)
    seen = mask.astype(jnp.float32)
    number = jnp.einsum('si,sj->ij', seen, seen)[..., None]
    return (products / (1e-3 + number)).astype(act.dtype)


@dataclasses.dataclass(kw_only=True, eq=False)
class TriangleMultiplication(hk.Module):
  """Sums over the third corner of triangles (Suppl. Alg. 11 and 12).

  Parameters: `layer_norm_input`, `{left,right}_{projection,gate}`,
  `center_layer_norm`, `output_projection`, `gating_linear`; with
  `fuse_projection_weights`, `left_norm_input`, `projection` and `gate`, whose
  outputs are [left | right], `center_norm`, `output_projection` and
  `gating_linear`.
  """

  equation: str = 'ikc,jkc->ijc'  # outgoing; 'kjc,kic->ijc': incoming edges
  num_intermediate_channel: int = 128
  fuse_projection_weights: bool = False
  zero_init: bool = True  # the update starts at 0
  remat: bool = True
  name: str | None = None

  def __call__(self, left_act, left_mask):
    """The update of the pairs.

    Args:
      left_act: [i, i, a].
      left_mask: boolean [i, i].

    Returns:
      [i, i, a] in the dtype of `left_act`.

    Raises:
      ValueError: shapes that don't fit, a mask that isn't boolean.
    """
    left_mask = _check(left_act, left_mask, 'left_act', 'left_mask')
    size, final = self.num_intermediate_channel, _final(self)
    is_fused = self.fuse_projection_weights
    input_norm = bind_layer_norm(
      'left_norm_input' if is_fused else 'layer_norm_input', left_act
    )
    sides = ('',) if is_fused else ('left_', 'right_')
    if is_fused:
      size = 2 * size
    projections = [bind_linear(f'{s}projection', size, left_act) for s in sides]
    gates = [
      bind_linear(f'{s}gate', size, left_act, scale=final, bias=1.0)
      for s in sides
    ]

    def project(layers, x, mask):
      norm, projections, gates = layers
      x, mask = norm(x), mask[..., None].astype(x.dtype)
      sides = [
        mask * projection(x) * jax.nn.sigmoid(gate(x))
        for projection, gate in zip(projections, gates, strict=True)
      ]
      return jnp.split(sides[0], 2, axis=-1) if is_fused else sides

    left, right = map_rows(
      project,
      (input_norm, projections, gates),
      left_act,
      left_mask,
      is_whole=not self.remat,
    )
    products = jnp.einsum(self.equation, left, right)
    layers = (
      input_norm,
      bind_layer_norm(
        'center_norm' if is_fused else 'center_layer_norm', products
      ),
      bind_linear(
        'output_projection', left_act.shape[-1], products, scale=final
      ),
      bind_linear(
        'gating_linear', left_act.shape[-1], left_act, scale=final, bias=1.0
      ),
    )

    def rows(layers, products, x):
      input_norm, center_norm, output, gate = layers
      return output(center_norm(products)) * jax.nn.sigmoid(gate(input_norm(x)))

    return map_rows(rows, layers, products, left_act, is_whole=not self.remat)


def _final(module):
  return 0.0 if module.zero_init else 1.0


def _check(act, mask, act_name, mask_name):
  """The mask as an array."""
  mask = jnp.asarray(mask)
  if act.ndim != 3:
    raise ValueError(
      f'{act_name}: expected [rows, residues, channels], got shape {act.shape}'
    )
  if mask.dtype != bool:
    raise ValueError(
      f'{mask_name}: expected booleans (True = there), got {mask.dtype}; '
      f'compare: {mask_name} != 0'
    )
  if mask.shape != act.shape[:2]:
    raise ValueError(
      f'{mask_name}: expected shape {act.shape[:2]}, as {act_name} has, '
      f'got {mask.shape}'
    )
  return mask
