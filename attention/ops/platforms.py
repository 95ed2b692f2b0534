"""One operation, implemented apart for each platform it is lowered for.

`jax.lax.platform_dependent` traces every branch in every program. Here a branch
is traced when a program is lowered for its platform, so that a program for CPUs
does not pay for tracing kernels of GPUs and TPUs.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# A program that XLA cuts for several TPUs: it can't be told how to cut kernels.
CUT_FOR_TPUS = 'tpu, cut by XLA'


def canonical(platform: str) -> str:
  """The name that JAX lowers for: 'gpu' and 'NVIDIA …' are 'cuda'.

  Raises:
    ValueError: another platform than JAX's.
  """
  platform = 'cuda' if platform == 'gpu' else platform
  if platform not in PLATFORMS:
    raise ValueError(
      f'platform: expected one of {list(PLATFORMS)}, got {platform!r}'
    )
  return platform


def default_platform() -> str:
  """The platform that programs are lowered for unless they say otherwise."""
  backend = jax.default_backend()
  if backend == 'gpu':
    version = jax.devices()[0].client.platform_version
    return 'rocm' if 'rocm' in version.lower() else 'cuda'
  return backend if backend in PLATFORMS else 'rocm'


def by_platform(choices: tuple, method: str, shapes, *args):
  """Calls `method` of the object that is chosen for the platform.

  Args:
    choices: pairs (platform, object), one for each of `PLATFORMS`, and one of
      `CUT_FOR_TPUS` if it differs; hashable.
    method: name of the object's method.
    shapes: pytree of `jax.ShapeDtypeStruct`, what the method returns.
    *args: pytrees of arrays, its arguments.

  Returns:
    What the method returns. The operation has no derivative of its own.
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
    like=None if _is_described() else _needs_devices(),
  )
  return jax.tree.unflatten(out_tree, results)


def _is_described() -> bool:
  """Whether programs are lowered for one device that isn't attached."""
  mesh = jax.sharding.get_abstract_mesh()
  return getattr(mesh, 'abstract_device', None) is not None and mesh.size == 1


@functools.cache
def _needs_devices():
  """A program that JAX lowers for known devices only.

  It looks for such in the parameters of operations; what is traced while
  lowering (see partitioning.py), it can't see.
  """
  identity = custom_partitioning(lambda x: x)
  identity.def_partition(None, sharding_rule='i -> i')
  return jax.make_jaxpr(identity)(jnp.zeros(1))


def find(equation) -> tuple | None:
  """What an equation of a jaxpr calls, if it is one of `by_platform`'s.

  Returns:
    (method, shapes of its arguments' leaves, how often `vmap` repeats it), or
    None.
  """
  if equation.primitive is not _by_platform:
    return None
  shapes, times = [x.aval.shape for x in equation.invars], 1
  for dims, size in equation.params['maps'][::-1]:
    times *= size
    shapes = [
      shape if dim is None else shape[:dim] + shape[dim + 1 :]
      for shape, dim in zip(shapes, dims, strict=True)
    ]
  return equation.params['method'], shapes, times


_by_platform = Primitive('attention_by_platform')
_by_platform.multiple_results = True


@_by_platform.def_impl
@functools.partial(
  jax.jit,
  static_argnames=('choices', 'method', 'tree', 'shapes', 'maps', 'like'),
)
def _run(*leaves, **params):
  return _by_platform.bind(*leaves, **params)


@_by_platform.def_abstract_eval
def _shapes(*_, shapes, **__):
  return [jax.core.ShapedArray(shape, dtype) for shape, dtype in shapes]


def _batch(leaves, dims, *, shapes, maps, **params):
  """`vmap`: the method is mapped when it is traced."""
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
  platform, is_cut, *leaves, choices, method, tree, shapes, maps, like
):
  del shapes, like
  chosen = dict(choices)[platform]
  if not is_cut:
    chosen = getattr(chosen, 'whole', chosen)

  def function(*leaves):
    arguments = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(getattr(chosen, method)(*arguments))

  for dims, size in maps:
    function = jax.vmap(function, dims, axis_size=size)
  return function(*leaves)


def _is_cut(context) -> bool:
  """Whether XLA is to cut the program, but for what `shard_map` has cut."""
  if hasattr(context, 'num_devices'):
    return (context.num_devices or 1) > 1
  mesh, manual = getattr(context, 'mesh', None), context.manual_axes
  return mesh is not None and set(manual) != set(mesh.axis_names)


def _lower(platform, context, *leaves, choices, **params):
  """Lowers the platform's choice."""
  is_cut = _is_cut(context.module_context.axis_context)
  if is_cut and platform == 'tpu' and CUT_FOR_TPUS in dict(choices):
    platform = CUT_FOR_TPUS
  rule = mlir.lower_fun(functools.partial(_trace, platform, is_cut))
  with warnings.catch_warnings():
    # Pallas's Triton back end is to go; `fused` says so when it has gone.
    warnings.filterwarnings('ignore', 'The Pallas Triton backend')
    return rule(context, *leaves, choices=choices, **params)


for _platform in PLATFORMS:
  mlir.register_lowering(
    _by_platform, functools.partial(_lower, _platform), platform=_platform
  )
