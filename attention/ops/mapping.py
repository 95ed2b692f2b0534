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

from attention.ops.platforms import PLATFORMS, by_platform

_POSITIONS = 2048  # rows × length per block on CPUs, to fit their caches
# On other platforms, bytes of a block's largest intermediate array: enough for
# kernels to run longer than it takes to launch them.
_LARGE = 2**26


def map_rows(function, shared, *arrays, axis=0, is_whole=False):
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

  Returns:
    The outputs of `function` for all rows.
  """
  count, length = arrays[0].shape[axis], arrays[0].shape[1 - axis]
  few = max(1, _POSITIONS // max(1, length))
  if is_whole or count <= few:
    return function(shared, *arrays)

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
  choices = tuple((p, cpu if p == 'cpu' else other) for p in PLATFORMS)
  return _map_rows(choices, shared, arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map_rows(choices, shared, arrays):
  shapes = choices[0][1].shapes(shared, arrays)
  return by_platform(choices, 'forward', shapes, shared, arrays)


def _forward(choices, shared, arrays):
  return _map_rows(choices, shared, arrays), (shared, arrays)


def _backward(choices, saved, d_outputs):
  shared, arrays = saved
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    (shared, _floats(arrays)),
  )
  return by_platform(choices, 'backward', shapes, shared, arrays, d_outputs)


_map_rows.defvjp(_forward, _backward)


def _floats(arrays):
  """Replace arrays without a float dtype by None."""
  return tuple(
    x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in arrays
  )


def _buffers(arrays, probe):
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
    """Return the bytes per row of the function's largest intermediate array."""
    equations = self.trace(shared, arrays).eqns
    made = (x.aval for equation in equations for x in equation.outvars)
    return max(x.size * x.dtype.itemsize for x in made) // self.size

  def shapes(self, shared, arrays):
    """Return the shapes and dtypes of `forward`'s outputs."""

    def of_all_rows(x):
      shape = list(x.shape)
      shape[self.axis] = self.count
      return jax.ShapeDtypeStruct(shape, x.dtype)

    blocks = jax.eval_shape(self.function, shared, *self._take(arrays, 0))
    return jax.tree.map(of_all_rows, blocks)

  def forward(self, shared, arrays):
    def step(number, outputs):
      start = self._start(number)
      blocks = self.function(shared, *self._take(arrays, start))
      return self._put(outputs, blocks, start)

    buffers = _buffers(self.shapes(shared, arrays), arrays[0])
    return lax.fori_loop(0, self._num_blocks, step, buffers)

  def backward(self, shared, arrays, d_outputs):
    """Return the gradients of `shared` and of the float arrays."""
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
    buffers = _buffers(_floats(arrays), jax.tree.leaves(d_outputs)[0])
    d_arrays, d_shared = lax.fori_loop(
      0, self._num_blocks, step, (buffers, zeros)
    )
    d_shared = jax.tree.map(lambda d, x: d.astype(x.dtype), d_shared, shared)
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
