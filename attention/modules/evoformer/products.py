"""Products of all rows with all rows: outer products, triangles (Suppl. 1.6).

Shapes use s for rows of the alignment, i and j for residues, and a, c and o for
channels.
"""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.evoformer.arguments import check_mask
from attention.modules.layers import bind_layer_norm, bind_linear
from attention.ops import meshes
from attention.ops.mapping import map_rows
from attention.ops.ring_product import ring_product


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
    mask = check_mask(act, mask, 'act', 'mask')
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
    left_mask = check_mask(left_act, left_mask, 'left_act', 'left_mask')
    size, final = self.num_intermediate_channel, 0.0 if self.zero_init else 1.0
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
