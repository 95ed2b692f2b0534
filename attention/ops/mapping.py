"""A function of rows, some rows at a time, computed anew in the backward pass.

What lies between a layer's input and output then exists for a few rows only.
The loop matters: recomputation that isn't in one may be scheduled at once, for
all layers side by side.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

_POSITIONS = 2048  # rows times their length at a time


def map_rows(function, shared, *arrays, is_whole: bool = False):
  """function(shared, *arrays), some of the arrays' rows at a time.

  Args:
    function: takes `shared` and a block of rows of every array, returns a
      pytree of arrays with as many rows; no row depends on another.
    shared: pytree of arrays, read by all rows; their gradient is summed up in
      float32.
    *arrays: [rows, length, …].
    is_whole: all rows at once, with nothing computed anew.

  Returns:
    What `function` returns, for all rows.
  """
  count, length = arrays[0].shape[:2]
  blocks = math.ceil(count / max(1, _POSITIONS // length))
  if blocks == 1 or is_whole:
    return function(shared, *arrays)
  size = math.ceil(count / blocks)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), shared)

  @jax.checkpoint
  def step(block):
    narrow = jax.tree.map(lambda w, x: w.astype(x.dtype), wide, shared)
    return function(narrow, *block)

  def cut(x):
    x = jnp.pad(x, [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, size, *x.shape[1:])

  outputs = lax.map(step, tuple(cut(x) for x in arrays))
  return jax.tree.map(
    lambda y: y.reshape(blocks * size, *y.shape[2:])[:count], outputs
  )
