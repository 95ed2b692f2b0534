"""Which devices hold what."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(batch_size: int) -> Mesh:
  """As many devices as divide the batch, along one axis, 'data'."""
  devices = jax.devices()
  count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
  return Mesh(np.array(devices[:count]), ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """Each device holds its share of the first axis."""
  return NamedSharding(mesh, PartitionSpec('data'))
