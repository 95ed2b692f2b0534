"""One step of training, compiled once a shape of batch, its buffers donated."""

from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attention.training.optimization import (
  gradients,
  nonfinite,
  optimizers,
  precision,
)
from attention.training.parallelism import sharding


class Step:
  """What turns a state and a batch into the next state, on a mesh."""

  def __init__(self, task, optimizer, schedule, seed: int, mesh, settings):
    self.mesh = mesh

    def begin():
      return init(task, optimizer, seed, settings.precision)

    self.like = sharding.of_state(jax.eval_shape(begin), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, self.like)
    self.init = jax.jit(begin, out_shardings=shardings)
    self._step = jax.jit(
      make(task, optimizer, schedule, seed, mesh, settings.num_microbatches),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )
    # Not in the main thread, which is the one that signals reach.
    self._compiler = futures.ThreadPoolExecutor(2)
    self._programs = {}

  @classmethod
  def create(cls, config, settings, task, devices=None) -> 'Step':
    """The step of a config.

    Args:
      config: of the run.
      settings: its `config.training`.
      task: its task.
      devices: to choose the mesh's from; all that are attached by default.

    Raises:
      ValueError: an optimizer, a mesh or parts of a batch that don't fit.
    """
    optimizer, schedule = optimizers.adamw(
      steps=settings.steps, **config.optimizer
    )
    num_parts = settings.num_microbatches
    if task.batch_size % num_parts:
      raise ValueError(
        'training.num_microbatches: expected a divisor of the batch of '
        f'{task.batch_size}, got {num_parts}'
      )
    mesh = sharding.make_mesh(
      task.batch_size // num_parts, **settings.mesh, devices=devices
    )
    with precision.applied(settings.precision):
      return cls(task, optimizer, schedule, config.seed, mesh, settings)

  def place(self, batch: dict) -> dict:
    """Puts a batch on the devices, a share on each."""
    return sharding.place(batch, self.mesh)

  def compile_init(self) -> futures.Future:
    """Begins to compile what gives the state to start with."""
    return self._compiler.submit(self.init.lower().compile)

  def compile(self, batch: dict) -> futures.Future:
    """Begins to compile the step for placed batches of that shape."""
    key = tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
    if key not in self._programs:
      self._programs[key] = self._compiler.submit(self.lower(batch).compile)
    return self._programs[key]

  def lower(self, batch: dict):
    """The step for batches of that shape, ready to be compiled."""
    return self._step.lower(self.like, batch, np.int32(0))

  def run(self, program, state: dict, batch: dict, step: int):
    """(state, metrics) after a step, counted from 0, by a compiled program."""
    return sharding.settle(self.mesh, program(state, batch, np.int32(step)))


def init(task, optimizer, seed: int, precision_policy: str = '') -> dict:
  """The state that training starts with."""
  params = task.init(jax.random.key(seed))
  return {
    'params': params,
    'optimizer': optimizer.init(params),
    'guard': {
      'bad': nonfinite.initial(),
      **precision.initial_scale(precision_policy),
    },
  }


def make(task, optimizer, schedule, seed: int, mesh, num_microbatches: int = 1):
  """The function (state, batch, step) -> (state, metrics), not yet jitted.

  The devices of `mesh` share the batch. `step` counts from 0. Random numbers
  are a function of (seed, step), so that a resumed run goes on exactly. A step
  whose loss or gradients aren't finite leaves parameters and optimizer alone.
  """
  compute = gradients.make(task, mesh, num_microbatches)

  def train_step(state, batch, step):
    rng = jax.random.fold_in(jax.random.key(seed), step + 1)
    scale = {k: v for k, v in state['guard'].items() if k != 'bad'}
    loss, grads = compute(state['params'], rng, batch, scale.get('scale', 1.0))
    squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
    grad_norm = jnp.sqrt(sum(squares))
    is_loss_finite = jnp.isfinite(loss)
    is_good = is_loss_finite & jnp.isfinite(grad_norm)
    bad = nonfinite.update(
      state['guard']['bad'],
      is_good,
      ~is_loss_finite | ~precision.may_fall(scale),
      step + 1,
      jnp.stack(squares),
    )

    def update(old):
      updates, opt_state = optimizer.update(
        grads, old['optimizer'], old['params']
      )
      params = optax.apply_updates(old['params'], updates)
      return {'params': params, 'optimizer': opt_state}

    old = {part: state[part] for part in ('params', 'optimizer')}
    # Not by `where`: that takes a third longer to compile, and some to run.
    new = jax.lax.cond(is_good, update, lambda old: old, old)
    new['guard'] = {'bad': bad, **precision.adjust(scale, is_good)}
    metrics = {
      'train/loss': loss,
      'train/grad_norm': grad_norm,
      'train/learning_rate': schedule(step + 1),
      'train/bad_steps': bad[0],
      'bad': bad,
    }
    return new, metrics

  return train_step
