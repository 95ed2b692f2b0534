"""The training step, compiled once per batch shape with a donated state."""

from collections.abc import Sequence
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
  """Training steps on a mesh: (state, batches) -> (state, metrics).

  One call runs up to `settings.steps_per_call` steps, see `repeated`.
  """

  def __init__(self, task, optimizer, schedule, seed: int, mesh, settings):
    self.mesh = mesh

    def begin():
      return init(task, optimizer, seed, settings.precision)

    self.like = sharding.of_state(jax.eval_shape(begin), mesh)
    self.trained, _ = gradients.partition(task, self.like['params'])
    shardings = jax.tree.map(lambda x: x.sharding, self.like)
    self.init = jax.jit(begin, out_shardings=shardings)
    self._limit = settings.steps_per_call
    one = make(task, optimizer, schedule, seed, mesh, settings.num_microbatches)
    self._call = jax.jit(
      repeated(one, self._limit, mesh),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )
    self._precision = settings.precision
    # Compile outside the main thread, which must stay free to handle signals.
    self._compiler = futures.ThreadPoolExecutor(2)
    self._programs = {}
    self._in_flight = None

  @classmethod
  def create(cls, config, settings, task, devices=None) -> 'Step':
    """Create the training step of a config.

    Args:
      config: the run's config.
      settings: `config.training` as a `TrainingConfig`.
      task: the config's task.
      devices: devices available to the mesh; all attached devices by default.

    Raises:
      ValueError: invalid optimizer settings, a mesh that does not fit the
        devices, the batch, the length of sequences or the model, or a number
        of micro-batches that does not divide the batch.
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
    if mesh.shape['context'] > 1:
      sharding.check_context(task.batch(0), mesh)
    sharding.check_pairs(task, mesh)
    with precision.applied(settings.precision):
      return cls(task, optimizer, schedule, config.seed, mesh, settings)

  def place(self, batch: dict) -> dict:
    """Shard a batch over the devices."""
    return sharding.place(batch, self.mesh)

  def stack(self, batches: Sequence[dict]) -> dict:
    """Stack the batches of a call's steps, and shard them over the devices.

    They have the same shapes. Calls of fewer steps than the most that a call
    may have are padded, so that all calls run the same program.
    """
    padding = [batches[-1]] * (self._limit - len(batches))
    return sharding.place(
      {k: np.stack([b[k] for b in (*batches, *padding)]) for k in batches[0]},
      self.mesh,
      sharding.stacked,
    )

  def compile_init(self) -> futures.Future:
    """Start compiling the initialisation in the background."""
    return self._compiler.submit(self.init.lower().compile)

  def compile(self, batches: dict) -> futures.Future:
    """Start compiling calls with stacked batches of this shape."""
    key = tuple((name, x.shape, x.dtype) for name, x in sorted(batches.items()))
    if key not in self._programs:
      lowered = self.lower(batches)
      self._programs[key] = self._compiler.submit(self._compile, lowered)
    return self._programs[key]

  def _compile(self, lowered):
    platform = self.mesh.devices.flat[0].platform
    return precision.compile(lowered, self._precision, platform)

  def lower(self, batches: dict):
    """Lower calls with stacked batches of this shape."""
    # With the mesh in its type, as in the loop, steps are traced only once.
    number = jax.ShapeDtypeStruct(
      (), np.int32, sharding=sharding.replicated(self.mesh)
    )
    with sharding.tracing_for(self.mesh):
      return self._call.lower(self.like, batches, number, number)

  def run(self, program, state: dict, batches: dict, first: int, count=1):
    """Run steps of a compiled call.

    Args:
      program: result of `compile`.
      state: the state before; donated.
      batches: result of `stack`.
      first: the first step, counted from 0.
      count: number of steps.

    Returns:
      (state, metrics): the state after, and each metric of each step. Metrics
      have `settings.steps_per_call` rows, the first `count` of them in use.
    """
    if sharding.are_virtual(self.mesh):
      jax.block_until_ready(self._in_flight)
    state, metrics = program(state, batches, np.int32(first), np.int32(count))
    self._in_flight = metrics
    return state, metrics


def init(task, optimizer, seed: int, precision_policy: str = '') -> dict:
  """Return the initial training state."""
  params = task.init(jax.random.key(seed))
  trained, _ = gradients.partition(task, params)
  return {
    'params': params,
    'optimizer': optimizer.init(trained),
    'guard': {
      'bad': nonfinite.initial(),
      **precision.initial_scale(precision_policy),
    },
  }


def make(task, optimizer, schedule, seed: int, mesh, num_microbatches: int = 1):
  """Make the unjitted step function (state, batch, step) -> (state, metrics).

  The batch is sharded over the devices of `mesh`. `step` counts from 0. Random
  keys depend only on (seed, step), so a resumed run reproduces an uninterrupted
  one exactly. A step with a non-finite loss or gradient changes neither the
  parameters nor the optimizer state. Gradients and optimizer state are those of
  the trained parameters, see `gradients.partition`.
  """
  compute = gradients.make(task, mesh, num_microbatches)
  optimizer = optax.with_extra_args_support(optimizer)

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
      ~is_loss_finite | ~precision.can_decrease(scale),
      step + 1,
      jnp.stack(squares),
    )

    def update(old):
      updates, opt_state = optimizer.update(
        grads, old['optimizer'], old['params'], grad_norm=grad_norm
      )
      params = optax.apply_updates(old['params'], updates)
      return {'params': params, 'optimizer': opt_state}

    trained, frozen = gradients.partition(task, state['params'])
    old = {'params': trained, 'optimizer': state['optimizer']}
    # `where` takes a third longer to compile and is slower to run.
    new = jax.lax.cond(is_good, update, lambda old: old, old)
    new['params'] = gradients.merge(new['params'], frozen)
    new['guard'] = {'bad': bad, **precision.adjust(scale, is_good)}
    metrics = {
      'train/loss': loss,
      'train/grad_norm': grad_norm,
      'train/learning_rate': schedule(_updates(old['optimizer']) + 1),
      'train/bad_steps': bad[0],
      'bad': bad,
    }
    return new, metrics

  return train_step


def _updates(optimizer_state):
  """The number of updates so far, which skipped steps do not change."""
  counts = optax.tree_utils.tree_get_all_with_path(optimizer_state, 'count')
  return counts[0][1]


def repeated(step, limit: int, mesh):
  """Make (state, batches, first, count) -> (state, metrics) of several steps.

  The steps run in a loop on the devices. A call thus starts one program and
  allocates its temporaries once, which small steps on CPUs notice.

  Args:
    step: a function (state, batch, step) -> (state, metrics).
    limit: the most steps of a call; with 1 there is no loop.
    mesh: the mesh that shards batches.

  Returns:
    A function of batches and metrics with a leading axis of `limit` steps.
  """
  step = jax.jit(step)  # traced once for the metrics' shapes and the loop

  def at(batches, i):
    def pick(x):
      x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
      shards = sharding.batched(mesh, x.shape)
      return jax.lax.with_sharding_constraint(x, shards)

    return {name: pick(x) for name, x in batches.items()}

  def one(state, batches, first, count):
    del count
    state, metrics = step(state, at(batches, 0), first)
    return state, jax.tree.map(lambda x: x[None], metrics)

  def several(state, batches, first, count):
    def body(i, carry):
      state, metrics = carry
      state, new = step(state, at(batches, i), first + i)
      return state, jax.tree.map(lambda old, x: old.at[i].set(x), metrics, new)

    _, shapes = jax.eval_shape(step, state, at(batches, 0), first)
    metrics = jax.tree.map(
      lambda x: jnp.zeros((limit, *x.shape), x.dtype), shapes
    )
    return jax.lax.fori_loop(0, count, body, (state, metrics))

  return one if limit == 1 else several
