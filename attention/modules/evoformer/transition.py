"""The transition of an alignment or of pairs (Suppl. 1.6.3 and 1.6.7)."""

import dataclasses

import haiku as hk
import jax

from attention.modules.layers import bind_layer_norm, bind_linear
from attention.ops import meshes
from attention.ops.mapping import map_rows


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
      bind_linear(
        'transition2', width, wide, scale=0.0 if self.zero_init else 1.0
      ),
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
