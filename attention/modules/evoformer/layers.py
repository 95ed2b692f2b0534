"""The layers of the Evoformer (Jumper et al. 2021, Suppl. 1.6).

Shapes use s for rows of the alignment, i and j for residues, and a, c and o for
channels. All layers process a few rows at a time and recompute their
intermediate activations in the backward pass; `remat=False` stores them
instead. The rows run along the layer's `axis` of its activations.

If the mesh in context has the axis `mesh_axis`, each of its devices holds and
computes its own rows (Cheng et al. 2022, "FastFold").
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.layers import bind_layer_norm, bind_linear
from attention.ops import meshes
from attention.ops.mapping import map_rows
from attention.ops.ring_product import ring_product


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
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
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
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
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
    msa_mask = _check(msa_act, msa_mask, 'msa_act', 'msa_mask')
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
    pair_mask = _check(pair_act, pair_mask, 'pair_act', 'pair_mask')
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


@dataclasses.dataclass(kw_only=True, eq=False)
class Transition(hk.Module):
  """A position-wise two-layer MLP with ReLU (Suppl. Alg. 9 and 15).

  Parameters: `input_layer_norm`, `transition1`, `transition2`.
  """

  num_intermediate_factor: int | float = 4  # hidden width / width
  axis: int = 0  # rows, or columns, that are computed together
  zero_init: bool = True  # initialise the update to 0
  remat: bool = True
  mesh_axis: str | None = meshes.PAIRS  # divides rows; None: never
  name: str | None = None

  def __call__(self, act, mask=None):
    """Compute the update [s, i, a]. Like AlphaFold's, it ignores the mask."""
    del mask
    width = act.shape[-1]
    hidden = int(width * self.num_intermediate_factor)
    layers = (
      bind_layer_norm('input_layer_norm', act),
      bind_linear('transition1', hidden, act, scale=2.0),
    )
    wide = jax.ShapeDtypeStruct((hidden,), act.dtype)
    layers += (
      bind_linear('transition2', width, wide, scale=_final_scale(self)),
    )

    def rows(layers, x):
      norm, expand, contract = layers
      return contract(jax.nn.relu(expand(norm(x))))

    return map_rows(
      rows,
      layers,
      act,
      axis=self.axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class OuterProductMean(hk.Module):
  """Mean outer products of alignment columns (Suppl. Alg. 10).

  Parameters: `layer_norm_input`, `left_projection`, `right_projection`,
  `output_w` (c, c, o), `output_b` (o).
  """

  axis = 1
  output_size: int  # width of the pair activations
  num_outer_channel: int = 32  # width of each factor of the outer product
  zero_init: bool = True  # initialise the update to 0
  remat: bool = True
  mesh_axis: str | None = meshes.PAIRS  # divides rows; None: never
  name: str | None = None

  def __call__(self, act, mask):
    """Compute the update of the pairs.

    Args:
      act: activations of the alignment [s, i, a].
      mask: boolean [s, i].

    Returns:
      [i, i, o] in the dtype of `act`.

    Raises:
      ValueError: If the shapes are incompatible or the mask is not boolean.
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

    left, right = map_rows(
      project,
      layers,
      act,
      mask,
      axis=self.axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )

    def products(shared, left, right):
      return map_rows(rows, (right, *shared), left, is_whole=not self.remat)

    def rows(shared, left):
      right, w, b = shared
      outer = jnp.einsum('isc,jse->icje', left, right)
      return jnp.einsum('icje,ceo->ijo', outer, w) + b

    products = ring_product(
      products,
      (w.astype(act.dtype), b.astype(act.dtype)),
      *(jnp.swapaxes(x, 0, 1) for x in (left, right)),
      mesh_axis=self.mesh_axis,
    )
    valid = meshes.cut(mask.astype(jnp.float32), 1, self.mesh_axis)
    count = meshes.cut(jnp.einsum('si,sj->ij', valid, valid), 0, self.mesh_axis)
    return (products / (1e-3 + count[..., None])).astype(act.dtype)


@dataclasses.dataclass(kw_only=True, eq=False)
class TriangleMultiplication(hk.Module):
  """A multiplicative update summed over third nodes (Suppl. Alg. 11 and 12).

  Parameters: `layer_norm_input`, `{left,right}_{projection,gate}`,
  `center_layer_norm`, `output_projection` and `gating_linear`. With
  `fuse_projection_weights` they are `left_norm_input`, `projection` and `gate`
  (each with outputs [left | right]), `center_norm`, `output_projection` and
  `gating_linear`.
  """

  equation: str = 'ikc,jkc->ijc'  # outgoing edges; 'kjc,kic->ijc' for incoming
  num_intermediate_channel: int = 128
  fuse_projection_weights: bool = False
  zero_init: bool = True  # initialise the update to 0
  remat: bool = True
  mesh_axis: str | None = meshes.PAIRS  # divides rows; None: never
  name: str | None = None

  @property
  def axis(self):
    return 1 if self.equation[0] == 'k' else 0  # columns of incoming edges

  def __call__(self, left_act, left_mask):
    """Compute the update of the pairs.

    Args:
      left_act: pair activations [i, i, a].
      left_mask: boolean [i, i].

    Returns:
      [i, i, a] in the dtype of `left_act`.

    Raises:
      ValueError: If the shapes are incompatible or the mask is not boolean.
    """
    left_mask = _check(left_act, left_mask, 'left_act', 'left_mask')
    size, final = self.num_intermediate_channel, _final_scale(self)
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
      axis=self.axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )

    products = self._multiply(left, right)
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

    return map_rows(
      rows,
      layers,
      products,
      left_act,
      axis=self.axis,
      is_whole=not self.remat,
      mesh_axis=self.mesh_axis,
    )

  def _multiply(self, left, right):
    """Multiply the factors of each channel: [i, j, c]."""

    def product(shared, left, right):
      del shared
      return jnp.einsum(self.equation, left, right)

    axes = dict(axis=self.axis, mesh_axis=self.mesh_axis)
    if left.shape[2] % meshes.size(self.mesh_axis):
      return ring_product(product, (), left, right, **axes)
    # Channels are independent: each device multiplies some of them.
    left, right = (meshes.cut(x, 2, self.mesh_axis) for x in (left, right))
    products = meshes.cut(product((), left, right), 2, self.mesh_axis)
    return meshes.cut(products, self.axis, self.mesh_axis)


def _final_scale(module):
  return 0.0 if module.zero_init else 1.0


def _check(act, mask, act_name, mask_name):
  """Validate the mask against `act` and return it as an array."""
  mask = jnp.asarray(mask)
  if act.ndim != 3:
    raise ValueError(
      f'{act_name}: expected [rows, residues, channels], got shape {act.shape}'
    )
  if mask.dtype != bool:
    raise ValueError(
      f'{mask_name}: expected booleans (True = valid), got {mask.dtype}; '
      f'compare: {mask_name} != 0'
    )
  if mask.shape != act.shape[:2]:
    raise ValueError(
      f'{mask_name}: expected shape {act.shape[:2]} to match {act_name}, '
      f'got {mask.shape}'
    )
  return mask
