"""The training loop, one for all tasks."""

import contextlib
import math
import pathlib
import signal
import threading
import time
from concurrent import futures

import jax
import numpy as np

from attention import plots
from attention.training import (
  optimizers,
  records,
  sharding,
  step,
  tasks,
)
from attention.training.checkpoints import Checkpoints, abstract
from attention.training.metrics import Metrics
from attention.training.progress import Reporter, Stopwatch


def train(config, workdir: pathlib.Path) -> None:
  """Runs a config in a workdir, from its last checkpoint if there is one.

  Args:
    config: an `ml_collections.ConfigDict`; see configs/.
    workdir: where the run's files go; made if it isn't there.

  Raises:
    ValueError: a config, data or workdir that don't fit; before anything is
      compiled or written.
    OSError: files that can't be read or written.
  """
  prepare(config, pathlib.Path(workdir))()


def prepare(config, workdir: pathlib.Path):
  """Checks everything that can be checked before compiling.

  Returns:
    The run, a function without arguments.

  Raises:
    ValueError, OSError: as `train`.
  """
  _check_training(config.training)
  steps = config.training.steps
  optimizer, schedule = optimizers.adamw(steps=steps, **config.optimizer)
  task = tasks.create(config)
  shapes = jax.eval_shape(lambda: step.init(task, optimizer, config.seed))
  note = records.check(workdir, config, task.record())
  if note:
    print(note)

  def run():
    records.write(workdir, config, task.record())
    with contextlib.closing(Checkpoints(workdir / 'checkpoints')) as saved:
      _run(config, workdir, task, optimizer, schedule, shapes, saved)

  return run


def _run(config, workdir, task, optimizer, schedule, shapes, checkpoints):
  training = config.training
  start = checkpoints.latest_step() or 0
  with Reporter(start, training.steps) as report:
    _introduce(report, task, shapes['params'])
    if start >= training.steps:
      report.say(
        f'this run ended at step {start:,}; to go on, raise '
        f'--config.training.steps above it ({training.steps:,} now)'
      )
      return
    mesh = sharding.make_mesh(task.batch_size)
    everywhere = sharding.replicated(mesh)

    def place(batch):
      return jax.device_put(batch, sharding.batched(mesh))

    train_step = jax.jit(
      step.make(task, optimizer, schedule, config.seed, mesh),
      donate_argnums=0,
      out_shardings=everywhere,
    )
    like = abstract(shapes, everywhere)
    report.say('compiling …')
    clock = time.perf_counter()
    lowered = train_step.lower(like, place(task.batch(start)), np.int32(start))
    with futures.ThreadPoolExecutor() as pool:
      compiling = pool.submit(lowered.compile)
      if start:
        state = checkpoints.restore(start, like)
      else:
        state = jax.jit(
          lambda: step.init(task, optimizer, config.seed),
          out_shardings=everywhere,
        )()
      compiled = compiling.result()
    report.say(f'compiled in {time.perf_counter() - clock:.1f} s')
    if start:
      report.say(f'resumed from step {start:,}')

    def advance(state, n):
      batch = place(task.batch(n))
      return sharding.settle(mesh, compiled(state, batch, np.int32(n)))

    metrics = Metrics(workdir / 'metrics.jsonl', start)
    with contextlib.closing(metrics), _StopSignals() as signals:
      _loop(
        training,
        range(start, training.steps),
        advance,
        state,
        task,
        metrics,
        report,
        checkpoints=checkpoints,
        evaluate=lambda state, n: _evaluate(
          workdir, task, state['params'], place, n, metrics, report
        ),
        signals=signals,
      )
    if signals.caught:
      report.say(
        f'stopped by {signals.caught}; a checkpoint is in {workdir}: '
        'the same command goes on from it'
      )


def _loop(
  training,
  span,
  advance,
  state,
  task,
  metrics,
  report,
  *,
  checkpoints,
  evaluate,
  signals,
):
  jax.block_until_ready(state)
  watch, logged = Stopwatch(), span.start
  for n in span:
    state, values = advance(state, n)
    done = n + 1
    is_last = done == training.steps
    report.advance(done)

    if done % training.log_every == 0 or is_last or done == 1:
      values = {k: float(v) for k, v in values.items()}
      seconds = watch.lap()
      values['train/tokens_per_second'] = (
        (done - logged) * task.tokens_per_step / seconds
      )
      metrics.write(done, values)
      report.log(
        done, {**values, 'seconds_per_step': seconds / (done - logged)}
      )
      logged = done

    is_evaluated = done % training.eval_every == 0 or is_last
    is_saved = done % training.checkpoint_every == 0 or is_last
    if is_evaluated or is_saved or signals.caught:
      # The steps under way are training's time, not the evaluation's.
      jax.block_until_ready(state)
      began = time.perf_counter()
      if is_evaluated and not signals.caught:
        evaluate(state, done)
      if is_saved or signals.caught:
        checkpoints.save(done, state)
      watch.exclude(time.perf_counter() - began)
    if signals.caught:
      return


def _evaluate(workdir, task, params, place, done, metrics, report):
  """Measures, draws the loss curve, and writes an example."""
  values = task.evaluate(params, place)
  metrics.write(done, values)
  report.evaluated(done, values)
  plots.loss_curve(metrics.lines, workdir / 'plots' / 'loss.png')
  example = task.example(params, seed=done)
  path = workdir / 'samples' / f'{done:08d}.txt'
  path.parent.mkdir(exist_ok=True)
  path.write_text(example)
  report.say(f'a sample, also in {path}:\n{example.strip()}\n')


class _StopSignals:
  """Notes SIGINT and SIGTERM for the loop; a second one stops at once."""

  def __enter__(self):
    self.caught = None
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _catch(self, number, _):
    if self.caught:
      raise KeyboardInterrupt
    self.caught = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'


def _introduce(report, task, params):
  leaves = jax.tree.leaves(params)
  count = sum(math.prod(leaf.shape) for leaf in leaves)
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) / 2**20
  devices = jax.devices()
  report.say(
    f'backend     {jax.default_backend()}, {len(devices)} × '
    f'{devices[0].device_kind}'
  )
  report.say(f'parameters  {count:,} ({size:.1f} MiB)')
  report.say(f'data        {task.describe()}')


def _check_training(training):
  for key in ('steps', 'log_every', 'eval_every', 'checkpoint_every'):
    if training[key] < 1:
      raise ValueError(
        f'training.{key}: expected 1 or more, got {training[key]}'
      )
