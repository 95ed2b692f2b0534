"""The mesh that a program is traced for.

Runs trace their programs with their mesh in context, and anyone can with
`jax.set_mesh`. Layers then divide their work over its axes themselves, in
`jax.shard_map`, where XLA could not or would gather whole arrays.
"""

import contextlib
import math
import threading

import jax
from jax.sharding import AbstractMesh, PartitionSpec

# Axes of the mesh of a run.
BATCH, TENSOR, CONTEXT, PAIRS = ('data', 'fsdp'), 'tensor', 'context', 'pairs'


def in_context() -> AbstractMesh | None:
  """Return the mesh in context; None without one, or inside `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.manual_axes else mesh


def none():
  """A context without a mesh, for programs of one device."""
  return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def size(axis: str | None) -> int:
  """Return the number of devices along an axis; 1 if no mesh has it."""
  mesh = in_context()
  return 1 if mesh is None else mesh.shape.get(axis, 1)


def per_device(function, in_specs, out_specs):
  """Return a function of whole arrays that each device computes on its shards.

  Args:
    function: takes and returns one device's shards.
    in_specs: pytree of `PartitionSpec` for the arguments.
    out_specs: the same for the results.
  """
  return jax.shard_map(
    function,
    mesh=in_context(),
    in_specs=in_specs,
    out_specs=out_specs,
    check_vma=False,
  )


_local = threading.local()


def vmap(function, in_axes=0):
  """Map a function over a batch, as `jax.vmap`; a mesh in context shards it."""

  def mapped(*arguments):
    with _in_batch():
      return function(*arguments)

  mesh = in_context()
  is_sharded = mesh is not None and {*BATCH} <= mesh.shape.keys()
  return jax.vmap(mapped, in_axes, spmd_axis_name=BATCH if is_sharded else None)


def in_batch() -> bool:
  """Whether a function is traced inside `vmap`: the batch axis is hidden."""
  return getattr(_local, 'in_batch', False)


@contextlib.contextmanager
def _in_batch():
  before = in_batch()
  _local.in_batch = True
  try:
    yield
  finally:
    _local.in_batch = before


def whole(x):
  """Constrain an array to be replicated over a mesh in context."""
  if in_context() is None:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def cut_batch(x):
  """Constrain [b, …] or [b, t, …, c] to be sharded as a run's batch is.

  Without it, XLA may shard activations like the parameters that they meet.
  """
  mesh = in_context()
  if mesh is None or in_batch() or not {*BATCH, CONTEXT} <= mesh.shape.keys():
    return x
  spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
  axes = [BATCH, (CONTEXT,)] if x.ndim > 2 else [BATCH]
  for i, names in enumerate(axes):
    if x.shape[i] % math.prod(mesh.shape[n] for n in names) == 0:
      spec[i] = names
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def cut(x, axis: int, name: str | None):
  """Constrain an array to be sharded along one of its axes, if it can be."""
  count = size(name)
  if count == 1 or x.shape[axis] % count:
    return x
  spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
  spec[axis] = name
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
