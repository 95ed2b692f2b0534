"""A function of rows, some rows at a time, computed anew in the backward pass.

What lies between a layer's input and output then exists for a few rows only.
The loop matters: XLA on CPU begins recomputation outside of loops as soon as it
can, for all layers at once, and memory is not saved (measured). On GPUs and
TPUs a barrier is enough, for layers small enough to be computed whole.

Blocks are cut by platform, as the pieces of ops/chunked are. What is cut has no
second derivative.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from attention.ops.platforms import PLATFORMS, by_platform

_POSITIONS = 2048  # rows times their length at a time on CPUs, for caches
# Elsewhere, bytes of the largest array that the function makes of a block: its
# kernels take longer than it takes to start them.
_LARGE = 2**26


def map_rows(function, shared, *arrays, axis=0, is_whole=False):
  """function(shared, *arrays), some of the arrays' rows at a time.

  Args:
    function: takes `shared` and a block of rows of every array, returns a
      pytree of arrays with as many rows; no row depends on another. It is
      traced for two sizes of blocks.
    shared: pytree of float arrays, read by all rows; their gradient is summed
      up over blocks in float32.
    *arrays: [rows, length, …]; the first is of floats. Only those of floats
      have a gradient.
    axis: where the rows are, 0 or 1, in arrays and outputs: [length, rows, …].
    is_whole: all rows at once, with nothing computed anew.

  Returns:
    What `function` returns, for all rows.
  """
  count, length = arrays[0].shape[axis], arrays[0].shape[1 - axis]
  few = max(1, _POSITIONS // max(1, length))
  if is_whole or count <= few:
    return function(shared, *arrays)

  def loop(rows):
    size = math.ceil(count / math.ceil(count / rows))
    examples = [lax.slice_in_dim(x, 0, size, axis=axis) for x in arrays]
    # The backward pass comes when Haiku's modules can't be called any more.
    traced, consts = jax.closure_convert(function, shared, *examples)
    if consts:
      raise ValueError('function: expected no arrays but its arguments')
    return _Loop(traced, axis, size, count)

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
  """None for those that are not of floats."""
  return tuple(
    x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in arrays
  )


def _buffers(arrays, probe):
  """Arrays of the same shapes, to be overwritten.

  Filled with some number that is computed just before: memory for zeros, which
  wait for nothing, would be taken at the program's start.
  """
  return jax.tree.map(
    lambda x: jnp.broadcast_to(probe.ravel()[0].astype(x.dtype), x.shape),
    arrays,
  )


@dataclasses.dataclass(frozen=True)
class _Loop:
  """`map_rows` and its gradient, as a platform computes them."""

  function: Callable  # traced for blocks of `size` rows
  axis: int
  size: int
  count: int  # rows in all

  def bytes_of_row(self, shared, arrays):
    """A row's share of the largest array that the function makes."""
    jaxpr = jax.make_jaxpr(self.function)(shared, *self._take(arrays, 0))
    made = (x.aval for equation in jaxpr.eqns for x in equation.outvars)
    return max(x.size * x.dtype.itemsize for x in made) // self.size

  def shapes(self, shared, arrays):
    """What `forward` returns."""

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
    return lax.fori_loop(0, self._number, step, buffers)

  def backward(self, shared, arrays, d_outputs):
    """Gradients of `shared` and of the arrays of floats."""
    if self._number == 1:
      # Without, XLA would keep what the forward pass computed.
      arrays, d_outputs = lax.optimization_barrier((arrays, d_outputs))

    def step(number, carry):
      d_arrays, d_shared = carry
      start = self._start(number)
      _, vjp = jax.vjp(self.function, shared, *self._take(arrays, start))
      d_blocks = self._take(d_outputs, start)
      is_ragged = self.count % self.size
      if is_ragged:
        # Rows that the block before has done: no share in sums, kept as are.
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
    d_arrays, d_shared = lax.fori_loop(0, self._number, step, (buffers, zeros))
    d_shared = jax.tree.map(lambda d, x: d.astype(x.dtype), d_shared, shared)
    return d_shared, d_arrays

  @property
  def _number(self):
    """How many blocks there are."""
    return math.ceil(self.count / self.size)

  def _start(self, number):
    """Where a block begins: the last earlier, if ragged."""
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
