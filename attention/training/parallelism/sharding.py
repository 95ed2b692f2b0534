"""Device meshes, and shardings of batches and training states."""

import math
import re

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from attention.ops.meshes import BATCH, CONTEXT, PAIRS

# Parameters sharded over 'tensor', by name, and the axis that is sharded,
# counted from the end: the head axis or the feed-forward width. Each matrix
# product with a sharded output is followed by one that contracts that axis.
_TENSOR = {
  r'/(query|key|value|qkv|expand|gate)/(w|b|lora_b)$': -1,
  r'/(linear|contract)/(w|lora_a)$': -2,
  r'/(query|key|value|gating)_w$': -2,
  r'/gating_b$': -2,
  r'/output_w$': -3,
}


def make_mesh(
  batch_size: int,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  context: int = 1,
  pairs: int = 1,
  devices=None,
) -> Mesh:
  """Create a mesh with the axes data, fsdp, tensor, context and pairs.

  Args:
    batch_size: size of the batch that is sharded over `data` × `fsdp` devices.
    data: number of devices along 'data', which replicate the parameters and
      shard the batch; -1 uses as many as are available and divide the batch.
    fsdp: number of devices along 'fsdp', which shard the batch, the parameters
      and the optimizer state.
    tensor: number of devices along 'tensor', which shard the heads and the
      feed-forward width.
    context: number of devices along 'context', which shard the positions of
      sequences; keys and values travel around them.
    pairs: number of devices along 'pairs', which shard the rows or columns of
      an alignment and of pairs of residues.
    devices: devices to choose from; all attached devices by default.

  Raises:
    ValueError: an axis size is invalid, there are too few devices, or
      `data` × `fsdp` does not divide the batch.
  """
  devices = jax.devices() if devices is None else devices
  if data != -1 and data < 1:
    raise ValueError(
      'training.mesh.data: expected 1 or more, or -1 for all remaining '
      f'devices, got {data}'
    )
  others = {'fsdp': fsdp, 'tensor': tensor, CONTEXT: context, PAIRS: pairs}
  for name, size in others.items():
    if size < 1:
      raise ValueError(f'training.mesh.{name}: expected 1 or more, got {size}')
  fixed = math.prod(others.values())
  if data == -1:
    data = max(
      (
        n
        for n in range(1, len(devices) // fixed + 1)
        if batch_size % (n * fsdp) == 0
      ),
      default=1,
    )
  count = data * fixed
  product = ' = '.join(
    ' × '.join(map(str, x))
    for x in (('data', *others), (data, *others.values()))
  )
  if count > len(devices):
    hint = (
      f'; set --config.training.cpu_devices={count} for more virtual devices'
      if devices[0].platform == 'cpu' and jax.process_count() == 1
      else ''
    )
    raise ValueError(
      f'training.mesh: expected at most the {len(devices)} available devices, '
      f'got {product}{hint}'
    )
  if batch_size % (data * fsdp):
    raise ValueError(
      f'training.mesh: expected data × fsdp to divide the batch of '
      f'{batch_size}, got {data} × {fsdp}'
    )
  if jax.process_count() > 1 and count != len(devices):
    raise ValueError(
      f'training.mesh: expected all {len(devices)} devices of all processes, '
      f'got {product}'
    )
  return Mesh(
    np.array(devices[:count]).reshape(data, *others.values()),
    ('data', *others),
    axis_types=(AxisType.Auto,) * 5,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Return a sharding that replicates an array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh, shape: tuple = ()) -> NamedSharding:
  """Return the sharding of an array of a batch: [b, …] or [b, t, …].

  The leading axis is sharded over the batch axes of the mesh, and positions
  over 'context' if it divides them.
  """
  spec = [BATCH]
  size = mesh.shape.get(CONTEXT, 1)
  if size > 1 and len(shape) > 1 and shape[1] % size == 0:
    spec.append(CONTEXT)
  return NamedSharding(mesh, PartitionSpec(*spec))


def stacked(mesh: Mesh | AbstractMesh, shape) -> NamedSharding:
  """The sharding of an array with a leading axis of batches."""
  return NamedSharding(
    mesh, PartitionSpec(None, *batched(mesh, shape[1:]).spec)
  )


def place(batch: dict, mesh: Mesh, sharding_of=batched) -> dict:
  """Shard a batch over the devices; every process must hold the whole batch."""
  return {
    name: jax.make_array_from_callback(
      x.shape, sharding_of(mesh, x.shape), x.__getitem__
    )
    for name, x in batch.items()
  }


def check_context(batch: dict, mesh: Mesh) -> None:
  """Raise ValueError if 'context' shards no array of the batch."""
  size = mesh.shape.get(CONTEXT, 1)
  shapes = [x.shape for x in batch.values()]
  if size > 1 and not any(CONTEXT in batched(mesh, s).spec for s in shapes):
    lengths = {shape[1] for shape in shapes if len(shape) > 1}
    raise ValueError(
      'training.mesh.context: expected a divisor of the length of sequences, '
      f'{" or ".join(map(str, sorted(lengths)))}, got {size}'
    )


def check_pairs(task, mesh: Mesh | AbstractMesh) -> None:
  """Raise ValueError if 'pairs' divides nothing of the task's model."""
  size = mesh.shape.get(PAIRS, 1)
  if size > 1 and not getattr(task, 'has_pairs', False):
    raise ValueError(
      'training.mesh.pairs: expected 1 for a model without pairs of residues, '
      f'got {size}'
    )


def of_state(shapes, mesh: Mesh | AbstractMesh):
  """Add a sharding to each leaf of a tree of shapes.

  The head and feed-forward axes are sharded over 'tensor', and the largest
  remaining axis over 'fsdp' and 'context', provided that the mesh axes divide
  them. These leave vectors and scalars whole. Optimizer state is sharded like
  the parameter it belongs to.
  """

  def place(path, x):
    sharding = NamedSharding(mesh, _spec(_name(path), x.shape, mesh.shape))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(place, shapes)


def _spec(name, shape, sizes):
  axes = [None] * len(shape)
  for pattern, axis in _TENSOR.items():
    if (
      sizes['tensor'] > 1
      and re.search(pattern, name)
      and len(shape) >= -axis
      and shape[axis] % sizes['tensor'] == 0
    ):
      axes[axis] = 'tensor'
  if len(shape) > 1:
    for names in (('fsdp', CONTEXT), ('fsdp',), (CONTEXT,)):
      names = tuple(n for n in names if sizes.get(n, 1) > 1)
      count = math.prod(sizes[n] for n in names)
      free = [
        i
        for i, axis in enumerate(axes)
        if axis is None and shape[i] % count == 0
      ]
      if names and free:
        axes[max(free, key=lambda i: shape[i])] = names
        break
  return PartitionSpec(*axes)


def _name(path):
  """Return the parameter name in a path, such as gpt/block_0/expand/w."""
  return '/'.join(str(key.key) for key in path if hasattr(key, 'key'))


def data_parallel(function, mesh: Mesh):
  """Apply function(params, rng, batch, scale) to the batch shards in parallel.

  If 'data' is the only mesh axis with more than one device, each device
  evaluates the function on its shard with its own random key, and the results
  are summed. They are reduced as a single vector, which saves a tenth of a
  small model's step on CPU.

  Args:
    function: returns a tree of sums over the batch.
    mesh: the devices.

  Returns:
    A function of the whole batch. On other meshes this is `function` itself,
    which XLA partitions according to the shardings of its arguments.
  """
  if mesh.size == 1 or mesh.size > mesh.shape['data']:
    return function

  def share(params, rng, batch, scale):
    rng = jax.random.fold_in(rng, jax.lax.axis_index('data'))
    vector, restore = ravel_pytree(function(params, rng, batch, scale))
    return restore(jax.lax.psum(vector, 'data'))

  whole = PartitionSpec()
  return jax.shard_map(
    share,
    mesh=mesh,
    in_specs=(whole, whole, PartitionSpec(BATCH), whole),
    out_specs=whole,
    check_vma=False,
  )


def tracing_for(mesh: Mesh):
  """A context in which layers know what the mesh shards."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def are_virtual(mesh: Mesh) -> bool:
  """Whether the devices are virtual CPU devices, which share a thread pool.

  With two steps in flight, all of its threads may end up waiting for a device
  that has no thread left to run on.
  """
  return mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
