"""Mean loss and gradients of a batch, over devices and micro-batches."""

import haiku as hk
import jax
import jax.numpy as jnp

from attention.training.parallelism import sharding


def make(task, mesh, num_microbatches: int = 1):
  """Make a function that computes the mean loss and its gradients.

  Args:
    task: its `loss` returns (total, count). The gradients are those of
      total / count over the whole batch, even where its parts have different
      counts.
    mesh: the batch is sharded over its devices.
    num_microbatches: each device computes its shard in this many sequential
      parts.

  Returns:
    A function (params, rng, batch, scale) -> (loss, gradients), the latter of
    the trained parameters, see `partition`. The loss is multiplied by `scale`
    before differentiation so that small gradients do not underflow in float16;
    both results are unscaled.
  """

  def weighted_gradients(params, rng, batch, scale):
    """Return (count, count · loss, count · gradients)."""
    trained, frozen = partition(task, params)

    def mean(trained):
      params = merge(trained, frozen)
      total, count = task.loss(params, rng, batch)
      loss = total / jnp.maximum(count, 1)
      return loss * scale, (loss, count)

    grads, (loss, count) = jax.grad(mean, has_aux=True)(trained)
    factor = count / scale
    return count, count * loss, jax.tree.map(lambda g: g * factor, grads)

  def accumulate(params, rng, batch, scale):
    if num_microbatches == 1:
      return weighted_gradients(params, rng, batch, scale)

    def add(sums, part):
      n, batch = part
      more = weighted_gradients(
        params, jax.random.fold_in(rng, n), batch, scale
      )
      return jax.tree.map(jnp.add, sums, more), None

    parts = jnp.arange(num_microbatches), _split(batch, num_microbatches)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(
      lambda: weighted_gradients(
        params, jax.random.fold_in(rng, 0), first[1], scale
      )
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]

  accumulate = sharding.data_parallel(accumulate, mesh)

  def gradients(params, rng, batch, scale=1.0):
    count, loss, grads = accumulate(params, rng, batch, scale)
    share = 1 / jnp.maximum(count, 1)
    return loss * share, jax.tree.map(lambda g: g * share, grads)

  return gradients


def partition(task, params) -> tuple:
  """Separate parameters into those that are trained and those that are frozen.

  Args:
    task: `is_trained(module, name, value)` chooses the trained parameters. All
      are trained if it has no such attribute, or it is None.
    params: {module: {name: array}}.

  Returns:
    (trained, frozen), both {module: {name: array}}.
  """
  if getattr(task, 'is_trained', None) is None:
    return params, {}
  return hk.data_structures.partition(task.is_trained, params)


def merge(trained, frozen):
  """Return the parameters that `partition` separated."""
  return hk.data_structures.merge(frozen, trained) if frozen else trained


def _split(batch, parts):
  """Split [b, …] into [parts, b / parts, …]; parts span all devices."""

  def split(x):
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(split, batch)
