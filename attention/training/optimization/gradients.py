"""The mean loss of a batch and its gradients, however the batch is cut up."""

import jax
import jax.numpy as jnp

from attention.training.parallelism import sharding


def make(task, mesh, num_microbatches: int = 1):
  """(params, rng, batch, scale) -> (loss, gradients), both unscaled.

  Args:
    task: its `loss` gives a total and how many things it is the total of;
      their mean is what is differentiated, over the whole batch whatever its
      parts hold.
    mesh: its devices share the batch.
    num_microbatches: parts of each share, computed one after another.

  Returns:
    The function. `scale` multiplies what is differentiated, so that small
    gradients are no zeros in float16.
  """

  def weigh(params, rng, batch, scale):
    """(count, count · loss, count · gradients)."""

    def mean(params):
      total, count = task.loss(params, rng, batch)
      loss = total / jnp.maximum(count, 1)
      return loss * scale, (loss, count)

    grads, (loss, count) = jax.grad(mean, has_aux=True)(params)
    return count, count * loss, jax.tree.map(lambda g: g * count / scale, grads)

  def add_up(params, rng, batch, scale):
    if num_microbatches == 1:
      return weigh(params, rng, batch, scale)

    def add(sums, part):
      n, batch = part
      more = weigh(params, jax.random.fold_in(rng, n), batch, scale)
      return jax.tree.map(jnp.add, sums, more), None

    parts = jnp.arange(num_microbatches), _cut(batch, num_microbatches)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(
      lambda: weigh(params, jax.random.fold_in(rng, 0), first[1], scale)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  add_up = sharding.data_parallel(add_up, mesh)

  def gradients(params, rng, batch, scale=1.0):
    count, loss, grads = add_up(params, rng, batch, scale)
    count = jnp.maximum(count, 1)
    return loss / count, jax.tree.map(lambda g: g / count, grads)

  return gradients


def _cut(batch, parts):
  """[b, …] → [parts, b / parts, …], each part with a share of every device."""

  def cut(x):
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(cut, batch)
