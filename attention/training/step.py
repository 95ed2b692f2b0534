"""One step of training, jitted, its buffers donated."""

import jax
import optax

from attention.training import sharding


def init(task, optimizer, seed: int):
  """The state that training starts with: parameters and optimizer."""
  params = task.init(jax.random.key(seed))
  return {'params': params, 'optimizer': optimizer.init(params)}


def make(task, optimizer, schedule, seed: int, mesh):
  """The function (state, batch, step) -> (state, metrics), not yet jitted.

  The devices of `mesh` share the batch. `step` counts from 0. Random numbers
  are a function of (seed, step), so that a resumed run goes on exactly.
  """
  gradients = sharding.data_parallel(jax.value_and_grad(task.loss), mesh)

  def train_step(state, batch, step):
    rng = jax.random.fold_in(jax.random.key(seed), step + 1)
    loss, grads = gradients(state['params'], rng, batch)
    updates, opt_state = optimizer.update(
      grads, state['optimizer'], state['params']
    )
    metrics = {
      'train/loss': loss,
      'train/grad_norm': optax.tree.norm(grads),
      'train/learning_rate': schedule(step + 1),
    }
    params = optax.apply_updates(state['params'], updates)
    return {'params': params, 'optimizer': opt_state}, metrics

  return train_step
