"""Map a function over blocks of rows, recomputing it in the backward pass.

A layer's intermediate arrays then exist for only a few rows at a time. The loop
is essential on CPU: outside loops, XLA starts the recomputation of all layers
as early as it can, which saves no memory (measured). On GPUs and TPUs, an
optimisation barrier is enough for layers that are small enough to be computed
whole.

Block sizes depend on the platform, as in the chunked implementation. Functions
that are split into blocks have no second derivative.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from attention.ops import meshes
from attention.ops.platforms import PLATFORMS, by_platform

_POSITIONS = 2048  # rows × length per block on CPUs, to fit their caches
# On other platforms, bytes of a block's largest intermediate array: enough for
# kernels to run longer than it takes to launch them.
_LARGE = 2**26


def map_rows(function, shared, *arrays, axis=0, is_whole=False, mesh_axis=None):
  """Compute function(shared, *arrays) for some rows at a time.

  Args:
    function: takes `shared` and a block of rows of every array, and returns a
      pytree of arrays with as many rows. Rows must not depend on each other.
      It is traced for two block sizes.
    shared: pytree of float arrays, used by all rows; their gradients are
      accumulated over blocks in float32.
    *arrays: [rows, length, …]; the first must have a float dtype. Only float
      arrays have gradients.
    axis: the row axis of arrays and outputs: 0, or 1 for [length, rows, …].
    is_whole: whether to compute all rows at once, without recomputation.
    mesh_axis: axis of the mesh in context, if it has it, whose devices each
      compute their own rows. All get `shared`; arrays [*, length, length] in
      it, such as a bias computed by rows, are gathered from all devices.

  Returns:
    The outputs of `function` for all rows.
  """
  total, length = arrays[0].shape[axis], arrays[0].shape[1 - axis]
  devices = _Devices.create(mesh_axis, axis, length, shared)
  arrays = tuple(pad(x, axis, devices.count) for x in arrays)
  count = arrays[0].shape[axis] // devices.count
  few = max(1, _POSITIONS // max(1, length))
  if is_whole or count <= few:
    whole = devices.spread(lambda shared, arrays: function(shared, *arrays))
    return trim(whole(shared, arrays), axis, total)
  choices = []

  def choose(shared, arrays):
    def loop(rows):
      size = math.ceil(count / math.ceil(count / rows))
      examples = [lax.slice_in_dim(x, 0, size, axis=axis) for x in arrays]
      # Trace now: Haiku modules can't be called in the backward pass.
      traced, consts = jax.closure_convert(function, shared, *examples)
      if consts:
        raise ValueError(
          f'function: expected no closed-over arrays, got {len(consts)}; pass '
          'them in shared'
        )
      return Loop(traced, axis, size, count)

    cpu = loop(few)
    other = loop(max(1, _LARGE // cpu.bytes_of_row(shared, arrays)))
    choices.extend((p, cpu if p == 'cpu' else other) for p in PLATFORMS)
    return arrays

  jax.eval_shape(devices.spread(choose), shared, arrays)
  return trim(_map_rows(tuple(choices), devices, shared, arrays), axis, total)


def pad(x, axis, count):
  """Append zeros, so that `count` divides the axis."""
  more = -x.shape[axis] % count
  widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths) if more else x


def trim(arrays, axis, total):
  """Keep the first `total` entries along an axis."""
  return jax.tree.map(
    lambda x: lax.slice_in_dim(x, 0, total, axis=axis), arrays
  )


@dataclasses.dataclass(frozen=True)
class _Devices:
  """The devices that rows are divided among."""

  name: str | None  # axis of the mesh in context; None: a single device
  count: int
  axis: int  # of the rows
  is_cut: tuple  # whether a leaf of `shared` is cut along its axis -2

  @classmethod
  def create(cls, name, axis, length, shared):
    count = meshes.size(name)
    is_cut = tuple(
      x.ndim > 2 and x.shape[-2:] == (length, length) and length % count == 0
      for x in jax.tree.leaves(shared)
    )
    return cls(name if count > 1 else None, count, axis, is_cut)

  @property
  def rows(self):
    return PartitionSpec(*[None] * self.axis, self.name)

  def of_shared(self, shared):
    leaves, tree = jax.tree.flatten(shared)
    return tree.unflatten(
      PartitionSpec(*[None] * (x.ndim - 2), self.name)
      if is_cut
      else PartitionSpec()
      for x, is_cut in zip(leaves, self.is_cut, strict=True)
    )

  def spread(self, function):
    """Make function(shared, arrays) of a device's rows one of all rows."""
    if self.name is None:
      return function

    def of_device(shared, arrays):
      return function(self._gather(shared), arrays)

    def of_all(shared, arrays):
      specs = self.of_shared(shared), self.rows
      return meshes.per_device(of_device, specs, self.rows)(shared, arrays)

    return of_all

  def spread_gradient(self, function):
    """`spread` for function(shared, arrays, d_outputs) -> gradients."""
    if self.name is None:
      return function

    def of_device(shared, arrays, d_outputs):
      d_shared, d_arrays = function(self._gather(shared), arrays, d_outputs)
      return self._sum(d_shared), d_arrays

    def of_all(shared, arrays, d_outputs):
      of_shared = self.of_shared(shared)
      return meshes.per_device(
        of_device, (of_shared, self.rows, self.rows), (of_shared, self.rows)
      )(shared, arrays, d_outputs)

    return of_all

  def _gather(self, shared):
    return self._each(
      shared,
      lambda x: lax.all_gather(x, self.name, axis=x.ndim - 2, tiled=True),
      lambda x: x,
    )

  def _sum(self, d_shared):
    """Sum gradients over devices."""
    return self._each(
      d_shared,
      lambda x: lax.psum_scatter(
        x, self.name, scatter_dimension=x.ndim - 2, tiled=True
      ),
      lambda x: lax.psum(x, self.name),
    )

  def _each(self, shared, of_cut, of_whole):
    leaves, tree = jax.tree.flatten(shared)
    return tree.unflatten(
      of_cut(x) if is_cut else of_whole(x)
      for x, is_cut in zip(leaves, self.is_cut, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map_rows(choices, devices, shared, arrays):
  def forward(shared, arrays):
    shapes = choices[0][1].shapes(shared, arrays)
    return by_platform(choices, 'forward', shapes, shared, arrays)

  return devices.spread(forward)(shared, arrays)


def _forward(choices, devices, shared, arrays):
  return _map_rows(choices, devices, shared, arrays), (shared, arrays)


def _backward(choices, devices, saved, d_outputs):
  def backward(shared, arrays, d_outputs):
    shapes = choices[0][1].gradients(shared, arrays)
    return by_platform(choices, 'backward', shapes, shared, arrays, d_outputs)

  shared, _ = saved
  d_shared, d_arrays = devices.spread_gradient(backward)(*saved, d_outputs)
  d_shared = jax.tree.map(lambda d, x: d.astype(x.dtype), d_shared, shared)
  return d_shared, d_arrays


_map_rows.defvjp(_forward, _backward)


def _floats(arrays):
  """Replace arrays without a float dtype by None."""
  return tuple(
    x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in arrays
  )


def allocate(arrays, probe):
  """Allocate arrays of the same shapes, to be overwritten.

  They hold a number of `probe`, which is computed just before. Zeros depend on
  nothing, so XLA would allocate them at the start of the program.
  """
  return jax.tree.map(
    lambda x: jnp.broadcast_to(probe.ravel()[0].astype(x.dtype), x.shape),
    arrays,
  )


@dataclasses.dataclass(frozen=True)
class Loop:
  """`map_rows` and its gradient for the block size of one platform."""

  function: Callable  # traced for blocks of `size` rows
  axis: int
  size: int
  count: int  # total rows

  def trace(self, shared, arrays):
    """Return the jaxpr of the function for one block of rows."""
    take = functools.partial(self._take, start=0)
    blocks = jax.eval_shape(take, arrays)
    return jax.make_jaxpr(self.function)(shared, *blocks).jaxpr

  def bytes_of_row(self, shared, arrays):
    """Return the bytes per row of the function's largest intermediate array.

    Arrays computed from `shared` alone, such as a scaled bias, do not count.
    """
    jaxpr, largest = self.trace(shared, arrays), 0
    of_rows = set(map(id, jaxpr.invars[len(jax.tree.leaves(shared)) :]))
    for equation in jaxpr.eqns:
      if not of_rows.isdisjoint(map(id, equation.invars)):
        of_rows.update(map(id, equation.outvars))
        sizes = (x.aval.size * x.aval.dtype.itemsize for x in equation.outvars)
        largest = max(largest, *sizes)
    return max(1, largest // self.size)

  def shapes(self, shared, arrays):
    """Return the shapes and dtypes of `forward`'s outputs."""

    def of_all_rows(x):
      shape = list(x.shape)
      shape[self.axis] = self.count
      return jax.ShapeDtypeStruct(shape, x.dtype)

    blocks = jax.eval_shape(self.function, shared, *self._take(arrays, 0))
    return jax.tree.map(of_all_rows, blocks)

  def gradients(self, shared, arrays):
    """Return the shapes and dtypes of `backward`'s outputs."""
    return (
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shared
      ),
      jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _floats(arrays)
      ),
    )

  def forward(self, shared, arrays):
    def step(number, outputs):
      start = self._start(number)
      blocks = self.function(shared, *self._take(arrays, start))
      return self._put(outputs, blocks, start)

    buffers = allocate(self.shapes(shared, arrays), arrays[0])
    return lax.fori_loop(0, self._num_blocks, step, buffers)

  def backward(self, shared, arrays, d_outputs):
    """Return gradients of `shared`, in float32, and of the float arrays."""
    if self._num_blocks == 1:
      # Without it, XLA would keep intermediate arrays of the forward pass.
      arrays, d_outputs = lax.optimization_barrier((arrays, d_outputs))

    def step(number, carry):
      d_arrays, d_shared = carry
      start = self._start(number)
      _, vjp = jax.vjp(self.function, shared, *self._take(arrays, start))
      d_blocks = self._take(d_outputs, start)
      is_ragged = self.count % self.size
      if is_ragged:
        # The last block overlaps its predecessor: count these rows only once.
        is_new = start + jnp.arange(self.size) >= number * self.size
        zeros = jax.tree.map(jnp.zeros_like, d_blocks)
        d_blocks = self._where(is_new, d_blocks, zeros)
      d_more, *d_blocks = vjp(d_blocks)
      d_blocks = _floats(d_blocks)
      if is_ragged:
        d_blocks = self._where(is_new, d_blocks, self._take(d_arrays, start))
      d_shared = jax.tree.map(
        lambda total, more: total + more.astype(jnp.float32), d_shared, d_more
      )
      return self._put(d_arrays, d_blocks, start), d_shared

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shared)
    buffers = allocate(_floats(arrays), jax.tree.leaves(d_outputs)[0])
    d_arrays, d_shared = lax.fori_loop(
      0, self._num_blocks, step, (buffers, zeros)
    )
    return d_shared, d_arrays

  @property
  def _num_blocks(self):
    return math.ceil(self.count / self.size)

  def _start(self, number):
    """Return a block's first row; the last block starts early if ragged."""
    return jnp.minimum(number * self.size, self.count - self.size)

  def _take(self, arrays, start):
    return jax.tree.map(
      lambda x: lax.dynamic_slice_in_dim(x, start, self.size, self.axis), arrays
    )

  def _put(self, arrays, blocks, start):
    return jax.tree.map(
      lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, self.axis),
      arrays,
      blocks,
    )

  def _where(self, rows, blocks, others):
    def select(x, other):
      shape = [-1 if i == self.axis else 1 for i in range(x.ndim)]
      return jnp.where(rows.reshape(shape), x, other)

    return jax.tree.map(select, blocks, others)
