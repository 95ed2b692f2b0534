"""Operations with a separate implementation for each lowering platform.

`jax.lax.platform_dependent` traces all branches in every program. Here a branch
is traced only when a program is lowered for its platform, so programs for CPUs
don't pay for tracing GPU and TPU kernels.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# For programs that XLA partitions over several TPUs, where it can't partition
# kernels.
PARTITIONED_TPUS = 'tpu, partitioned by XLA'


def canonical(platform: str) -> str:
  """Return the name of a lowering platform; 'gpu' means 'cuda'.

  Raises:
    ValueError: JAX has no such platform.
  """
  platform = 'cuda' if platform == 'gpu' else platform
  if platform not in PLATFORMS:
    raise ValueError(
      f'platform: expected one of {list(PLATFORMS)}, got {platform!r}'
    )
  return platform


def default_platform() -> str:
  """Return the platform that programs are lowered for by default."""
  backend = jax.default_backend()
  if backend == 'gpu':
    version = jax.devices()[0].client.platform_version
    return 'rocm' if 'rocm' in version.lower() else 'cuda'
  return backend if backend in PLATFORMS else 'rocm'


def by_platform(choices: tuple, method: str, shapes, *args):
  """Call `method` of the object that is chosen for the lowering platform.

  The operation has no derivative of its own.

  Args:
    choices: pairs (platform, object), one for each of `PLATFORMS`, and one for
      `PARTITIONED_TPUS` if it differs; hashable.
    method: name of the object's method.
    shapes: pytree of `jax.ShapeDtypeStruct` for the method's results.
    *args: pytrees of arrays, the method's arguments.

  Returns:
    The method's results.
  """
  leaves, tree = jax.tree.flatten(args)
  expected, out_tree = jax.tree.flatten(shapes)
  results = _by_platform.bind(
    *(jnp.asarray(x) for x in leaves),
    choices=choices,
    method=method,
    tree=tree,
    shapes=tuple((x.shape, jnp.dtype(x.dtype)) for x in expected),
    maps=(),
    marker=None if _is_described() else _needs_devices(),
  )
  return jax.tree.unflatten(out_tree, results)


def _is_described() -> bool:
  """Whether programs are lowered for a single device that isn't attached."""
  mesh = jax.sharding.get_abstract_mesh()
  return getattr(mesh, 'abstract_device', None) is not None and mesh.size == 1


@functools.cache
def _needs_devices():
  """Return a jaxpr whose presence makes JAX require known devices.

  JAX searches the parameters of operations for such jaxprs, but it can't find
  those that are traced during lowering (see partitioning.py).
  """
  identity = custom_partitioning(lambda x: x)
  identity.def_partition(None, sharding_rule='i -> i')
  return jax.make_jaxpr(identity)(jnp.zeros(1))


def find(equation) -> tuple | None:
  """Return what an equation of a jaxpr calls, if `by_platform` created it.

  Returns:
    (the first choice, method, its arguments as shapes and dtypes, number of
    repetitions by `vmap`), or None for other equations.
  """
  if equation.primitive is not _by_platform:
    return None
  params = equation.params
  shapes, times = [x.aval.shape for x in equation.invars], 1
  for dims, size in params['maps'][::-1]:
    times *= size
    shapes = [
      shape if dim is None else shape[:dim] + shape[dim + 1 :]
      for shape, dim in zip(shapes, dims, strict=True)
    ]
  leaves = [
    jax.ShapeDtypeStruct(shape, x.aval.dtype)
    for shape, x in zip(shapes, equation.invars, strict=True)
  ]
  arguments = jax.tree.unflatten(params['tree'], leaves)
  return params['choices'][0][1], params['method'], arguments, times


_by_platform = Primitive('attention_by_platform')
_by_platform.multiple_results = True


@_by_platform.def_impl
@functools.partial(
  jax.jit,
  static_argnames=('choices', 'method', 'tree', 'shapes', 'maps', 'marker'),
)
def _run(*leaves, **params):
  return _by_platform.bind(*leaves, **params)


@_by_platform.def_abstract_eval
def _shapes(*_, shapes, **__):
  return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _batch(leaves, dims, *, shapes, maps, **params):
  """Batching rule: `vmap` is applied to the method when it is traced."""
  size = next(
    x.shape[dim] for x, dim in zip(leaves, dims, strict=True) if dim is not None
  )
  results = _by_platform.bind(
    *leaves,
    shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
    maps=(*maps, (tuple(dims), size)),
    **params,
  )
  return results, (0,) * len(results)


batching.primitive_batchers[_by_platform] = _batch


def _trace(
  platform, is_partitioned, *leaves, choices, method, tree, shapes, maps, marker
):
  del shapes, marker
  chosen = dict(choices)[platform]
  if not is_partitioned:
    chosen = getattr(chosen, 'whole', chosen)

  def function(*leaves):
    arguments = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(getattr(chosen, method)(*arguments))

  for dims, size in maps:
    function = jax.vmap(function, dims, axis_size=size)
  return function(*leaves)


def _is_partitioned(context) -> bool:
  """Whether XLA partitions the program over axes not left to `shard_map`."""
  if hasattr(context, 'num_devices'):
    return (context.num_devices or 1) > 1
  mesh, manual = getattr(context, 'mesh', None), context.manual_axes
  return mesh is not None and set(manual) != set(mesh.axis_names)


def _lower(platform, context, *leaves, choices, **params):
  """Lower the method of the platform's choice."""
  is_partitioned = _is_partitioned(context.module_context.axis_context)
  if is_partitioned and platform == 'tpu' and PARTITIONED_TPUS in dict(choices):
    platform = PARTITIONED_TPUS
  rule = mlir.lower_fun(functools.partial(_trace, platform, is_partitioned))
  with warnings.catch_warnings():
    # Pallas deprecates its Triton backend; `fused` reports its removal.
    warnings.filterwarnings('ignore', 'The Pallas Triton backend')
    return rule(context, *leaves, choices=choices, **params)


for _platform in PLATFORMS:
  mlir.register_lowering(
    _by_platform, functools.partial(_lower, _platform), platform=_platform
  )
