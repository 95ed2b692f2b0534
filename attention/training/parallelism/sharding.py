"""Which devices hold what."""

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

# What is cut over 'tensor', and along which axis, counted from the end: heads
# and the feed-forward's width. Each cut matrix product is followed by one that
# adds up over the cut.
_TENSOR = {
  r'/(query|key|value|qkv|expand)/[wb]$': -1,
  r'/(linear|contract)/w$': -2,
  r'/(query|key|value|gating)_w$': -2,
  r'/gating_b$': -2,
  r'/output_w$': -3,
}
_BATCH = ('data', 'fsdp')  # both share the batch


def make_mesh(
  batch_size: int,
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices=None,
) -> Mesh:
  """Devices along the axes 'data', 'fsdp' and 'tensor'.

  Args:
    batch_size: of what `data` × `fsdp` devices share.
    data: how many hold the same parameters, each for its share of a batch;
      -1: as many as there are, and as divide the batch.
    fsdp: how many share a batch, and parameters and optimizer state too.
    tensor: how many share heads and the feed-forward's width.
    devices: to choose from; all that are attached by default.

  Raises:
    ValueError: there are fewer devices, or they don't divide the batch.
  """
  devices = jax.devices() if devices is None else devices
  if data != -1 and data < 1:
    raise ValueError(
      'training.mesh.data: expected 1 or more, or -1 for all that are left, '
      f'got {data}'
    )
  for name, size in (('fsdp', fsdp), ('tensor', tensor)):
    if size < 1:
      raise ValueError(f'training.mesh.{name}: expected 1 or more, got {size}')
  if data == -1:
    data = max(
      (
        n
        for n in range(1, len(devices) // (fsdp * tensor) + 1)
        if batch_size % (n * fsdp) == 0
      ),
      default=1,
    )
  count = data * fsdp * tensor
  if count > len(devices):
    hint = (
      f'; --config.training.cpu_devices={count} gives more of them'
      if devices[0].platform == 'cpu' and jax.process_count() == 1
      else ''
    )
    raise ValueError(
      f'training.mesh: expected at most {len(devices)} devices, which is what '
      f'there is, got data × fsdp × tensor = {data} × {fsdp} × {tensor}{hint}'
    )
  if batch_size % (data * fsdp):
    raise ValueError(
      f'training.mesh: expected data × fsdp to divide the batch of '
      f'{batch_size}, got {data} × {fsdp}'
    )
  if jax.process_count() > 1 and count != len(devices):
    raise ValueError(
      f'training.mesh: expected all {len(devices)} devices of all processes, '
      f'got data × fsdp × tensor = {data} × {fsdp} × {tensor}'
    )
  return Mesh(
    np.array(devices[:count]).reshape(data, fsdp, tensor),
    ('data', 'fsdp', 'tensor'),
    axis_types=(AxisType.Auto,) * 3,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """Each device holds its share of the first axis."""
  return NamedSharding(mesh, PartitionSpec(_BATCH))


def place(batch: dict, mesh: Mesh) -> dict:
  """Puts a batch, which every process has whole, on the devices."""
  sharding = batched(mesh)
  return {
    name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    for name, x in batch.items()
  }


def of_state(shapes, mesh: Mesh | AbstractMesh):
  """A tree of shapes with a sharding each.

  Over 'tensor' go the axes of heads and of the feed-forward's width, over
  'fsdp' the largest that is left, where they divide; vectors and scalars stay
  whole. What the optimizer holds of a parameter goes as the parameter does.
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
  free = [
    i
    for i, axis in enumerate(axes)
    if axis is None and shape[i] % sizes['fsdp'] == 0
  ]
  if sizes['fsdp'] > 1 and len(shape) > 1 and free:
    axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*axes)


def _name(path):
  """gpt/block_0/expand/w, whatever it stands in."""
  return '/'.join(str(key.key) for key in path if hasattr(key, 'key'))


def data_parallel(function, mesh: Mesh):
  """function(params, rng, batch, scale), of whole batches, on shares of them.

  Args:
    function: gives a tree of sums over the batch.
    mesh: where only its axis 'data' has devices, each computes its share, with
      random numbers of its own, and the sums are added up. They travel as one
      vector: on CPU that saves a tenth of a small model's step.

  Returns:
    The function of the whole batch; on other meshes the function itself, which
    XLA cuts up as its arguments are.
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
    in_specs=(whole, whole, PartitionSpec(_BATCH), whole),
    out_specs=whole,
    check_vma=False,
  )


def settle(mesh: Mesh, results):
  """Waits for results on virtual CPU devices; elsewhere, passes them on.

  Those devices share one pool of threads. With a second step under way, all of
  its threads can come to wait for a device that finds no thread to run on.
  """
  is_virtual = mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu'
  return jax.block_until_ready(results) if is_virtual else results
