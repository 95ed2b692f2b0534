"""One step of training, compiled once a shape of batch, its buffers donated."""

from concurrent import futures

import jax
import numpy as np
import optax

from attention.training import sharding


class Step:
  """What turns a state and a batch into the next state, on a mesh."""

  def __init__(self, task, optimizer, schedule, seed: int, mesh):
    self._mesh = mesh
    everywhere = sharding.replicated(mesh)
    self.init = jax.jit(
      lambda: init(task, optimizer, seed), out_shardings=everywhere
    )
    self._step = jax.jit(
      make(task, optimizer, schedule, seed, mesh),
      donate_argnums=0,
      out_shardings=everywhere,
    )
    self.like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
      jax.eval_shape(self.init),
    )
    self._compiler = futures.ThreadPoolExecutor(1)
    self._programs = {}

  def place(self, batch: dict) -> dict:
    """Puts a batch on the devices, a share on each."""
    return jax.device_put(batch, sharding.batched(self._mesh))

  def compile(self, batch: dict) -> futures.Future:
    """Begins to compile the step for placed batches of that shape."""
    key = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
    if key not in self._programs:
      lowered = self._step.lower(self.like, batch, np.int32(0))
      self._programs[key] = self._compiler.submit(lowered.compile)
    return self._programs[key]

  def run(self, program, state: dict, batch: dict, step: int):
    """(state, metrics) after a step, counted from 0, by a compiled program."""
    return sharding.settle(self._mesh, program(state, batch, np.int32(step)))


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
