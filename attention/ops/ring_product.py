"""Products of all rows with all rows, where devices each hold some rows.

A device's rows of the left factor stay. Those of the right factor travel around
a ring, and meet all others on their way; in the backward pass they go around
once more, with their gradient. No device holds all rows of a factor.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from attention.ops import meshes
from attention.ops.mapping import allocate, pad, trim


def ring_product(function, shared, left, right, *, axis=0, mesh_axis=None):
  """Compute function(shared, left, right) in blocks, one for each two devices.

  Args:
    function: takes `shared` and a block of rows of each factor, and returns
      their products: an array with the rows of `left` along `axis` and those of
      `right` along 1 - `axis`. It closes over no arrays.
    shared: pytree of float arrays, used by all rows.
    left: the left factor.
    right: the right factor, with as many rows.
    axis: the row axis of both factors, 0 or 1.
    mesh_axis: axis of the mesh in context over which rows are divided; if the
      mesh does not have it, `function` is called once.

  Returns:
    The products of all rows.
  """
  count = meshes.size(mesh_axis)
  if count == 1:
    return function(shared, left, right)
  total = left.shape[axis]
  left, right = (pad(x, axis, count) for x in (left, right))
  products = _product(function, axis, mesh_axis, shared, left, right)
  return trim(trim(products, 0, total), 1, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(function, axis, name, shared, left, right):
  def of_device(shared, left, right):
    ring = _Ring(axis, name, right)

    def step(number, carry):
      right, products = carry
      # Sent before the product, which the transfer may overlap.
      after = ring.send(right)
      block = function(shared, left, right)
      return after, lax.dynamic_update_slice_in_dim(
        products, block, ring.start(number), 1 - axis
      )

    block = jax.eval_shape(function, shared, left, right)
    shape = list(block.shape)
    shape[1 - axis] *= ring.count
    products = jax.ShapeDtypeStruct(shape, block.dtype)
    products = allocate(products, left)  # all are overwritten
    return lax.fori_loop(0, ring.count, step, (right, products))[1]

  rows = _rows(axis, name)
  return meshes.per_device(of_device, (PartitionSpec(), rows, rows), rows)(
    shared, left, right
  )


def _forward(function, axis, name, *factors):
  return _product(function, axis, name, *factors), factors


def _backward(function, axis, name, factors, d_products):
  def of_device(shared, left, right, d_products):
    ring = _Ring(axis, name, right)

    def step(number, carry):
      right, d_right, d_others = carry
      after = ring.send(right)
      d_block = lax.dynamic_slice_in_dim(
        d_products, ring.start(number), ring.size, 1 - axis
      )
      _, vjp = jax.vjp(function, shared, left, right)
      *others, more = vjp(d_block)
      d_right, d_others = jax.tree.map(
        lambda total, x: jnp.where(number == 0, 0, total) + x,
        (d_right, d_others),
        (more, others),
      )
      return after, ring.send(d_right), d_others

    sums = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32),
      (right, [shared, left]),
    )
    _, d_right, (d_shared, d_left) = lax.fori_loop(
      0, ring.count, step, (right, *allocate(sums, d_products))
    )
    gradients = lax.psum(d_shared, name), d_left, d_right
    return jax.tree.map(
      lambda d, x: d.astype(x.dtype), gradients, (shared, left, right)
    )

  rows = _rows(axis, name)
  specs = PartitionSpec(), rows, rows
  return meshes.per_device(of_device, (*specs, rows), specs)(
    *factors, d_products
  )


_product.defvjp(_forward, _backward)


def _rows(axis, name):
  return PartitionSpec(*[None] * axis, name)


class _Ring:
  """The way of a device's rows around all devices."""

  def __init__(self, axis, name, rows):
    self.name, self.count = name, lax.axis_size(name)
    self.size = rows.shape[axis]

  def send(self, x):
    """Send to the next device, and receive from the previous one."""
    after = [(i, (i + 1) % self.count) for i in range(self.count)]
    return lax.ppermute(x, self.name, after)

  def start(self, number):
    """Return the first of all rows that a device holds at a step."""
    return (lax.axis_index(self.name) - number) % self.count * self.size
