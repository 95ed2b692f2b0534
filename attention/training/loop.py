"""The training loop, shared by all tasks."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shlex
import time

import haiku as hk
import jax
import numpy as np

from attention.training import tasks
from attention.training.calls import Calls
from attention.training.optimization import precision
from attention.training.optimization.nonfinite import NotFinite, Watch
from attention.training.optimization.step import Step
from attention.training.parallelism import processes, sharding
from attention.training.reporting import flops, memory
from attention.training.reporting.console import Reporter, Stopwatch
from attention.training.reporting.profiling import Trace
from attention.training.reporting.tensorboard import TensorBoard
from attention.training.stop_signals import Interrupted, StopSignals
from attention.training.training_config import TrainingConfig
from attention.training.workdir import Unusable, lock, run_files
from attention.training.workdir.checkpoints import Checkpoints
from attention.training.workdir.metrics import Metrics


def train(config, workdir: pathlib.Path) -> None:
  """Train a config in a workdir, resuming from its last checkpoint if any.

  Args:
    config: an `ml_collections.ConfigDict`; see configs/.
    workdir: folder for the run's files, created if missing.

  Raises:
    ValueError: the config, data or workdir is invalid, or another process is
      running in the workdir. Raised before anything is compiled or written.
    OSError: a file cannot be read or written.
    NotFinite: the loss or gradients were non-finite for too many consecutive
      steps.
  """
  prepare(config, pathlib.Path(workdir))()


def prepare(
  config,
  workdir: pathlib.Path,
  *,
  command: str = '',
  profile: tuple[int, int] | None = None,
):
  """Run all checks that need no compilation, and return the run.

  Args:
    config: as for `train`.
    workdir: as for `train`.
    command: command line that resumes the run, printed when it is stopped.
    profile: numbers of completed steps at which a trace starts and stops; the
      first is below the number of steps.

  Returns:
    A function without arguments that trains.

  Raises:
    ValueError: as `train`.
    OSError: as `train`.
  """
  settings = TrainingConfig.create(config.training.to_dict())
  if jax.process_count() > 1:
    # A lost process is noticed after the call; JAX aborts not much later.
    settings = dataclasses.replace(settings, steps_per_call=1)
  if profile and profile[0] >= settings.steps:
    raise ValueError(
      f'--profile: expected START below the {settings.steps:,} steps of the '
      f'run, got {profile[0]:,}'
    )
  task = tasks.create(config, run_files.data_to_resume(workdir, config))
  step = Step.create(config, settings, task)
  memory.check_fits(step.like, step.mesh)
  run_files.check(workdir, config, task.record())

  def record():
    if processes.is_first():
      run_files.write(workdir, config, task.record())

  def run():
    with contextlib.ExitStack() as stack:
      if processes.is_first():
        stack.enter_context(lock.held(workdir))
      # Again, as another run may have used the workdir in the meantime.
      note = run_files.check(workdir, config, task.record())
      stack.enter_context(precision.applied(settings.precision))
      with processes.exit_if_peer_lost():
        active = _Run(settings, workdir, task, step, command, profile, stack)
        active(record, note)

  return run


class _Run:
  """An active run: its task and step, and the files that it writes."""

  def __init__(self, settings, workdir, task, step, command, profile, stack):
    self.settings, self.workdir = settings, workdir
    self.task, self.step = task, step
    self.command, self.profile = command, profile

    def open_(x):
      return stack.enter_context(contextlib.closing(x))

    # Enter the signal handlers first, so that they outlive what follows.
    self.stop = stack.enter_context(StopSignals())
    self.report = stack.enter_context(
      Reporter(settings.steps, is_quiet=not processes.is_first())
    )
    self.checkpoints = open_(
      Checkpoints(workdir / 'checkpoints', settings.num_kept, self.report.print)
    )
    restored = self.checkpoints.latest_step()
    self.start = restored or 0
    self.metrics = open_(
      Metrics(
        workdir / 'metrics.jsonl',
        # A run that starts anew has nothing to go on from.
        -1 if restored is None else restored,
        is_kept=processes.is_first(),
      )
    )
    self.trace = open_(Trace(workdir / 'profile', profile))
    self.calls = Calls(task, settings, profile or ())
    self._open = open_

  def __call__(self, record, note):
    """Train the remaining steps, if any, after `record()` and the note."""
    _introduce(self.report, self.task, self.step)
    steps = self.settings.steps
    is_evaluated = self.metrics.has('eval/', self.start)
    if self.start > steps or (self.start == steps and is_evaluated):
      self.report.print(
        f'this run is at step {self.start:,}; to continue it, raise '
        f'--config.training.steps above that (now {steps:,})'
      )
      return
    record()
    if note:
      self.report.print(note)
    state = self._begin()
    done = self.start
    # A pretrained model is evaluated before it is trained.
    is_due = (
      self._is_due('eval_every', done) if done else self._pretrained is not None
    )
    if is_due and not is_evaluated:
      self._evaluate(state, done)
    if not self.stop.name:
      done, state = self._train(state)
    if self.stop.name:
      if done:
        self._save(state, done)
        self.checkpoints.wait()
      self.report.print(
        f'stopped by {self.stop.name} at step {done:,}; '
        f'to resume, run the same command again: {self.command}'
      )
      return
    self.checkpoints.wait()
    if self.checkpoints.saved != done:
      self.report.print(
        f'finished, but step {done:,} was not saved; once there is room on the '
        'disk, run the same command again, which repeats the steps since the '
        f'last checkpoint: {self.command}'
      )
      return
    self.report.print(
      f'finished: see {self.workdir}/checkpoints/{done} and '
      f'{self.workdir}/plots; to use the model: python -m attention '
      f'{self.task.command} --workdir={shlex.quote(str(self.workdir))}'
    )

  def _begin(self):
    """Compile the step while initialising or restoring; returns the state."""
    self.report.print('compiling …')
    self.report.advance(self.start)
    clock = time.perf_counter()
    init = None if self.start else self.step.compile_init()
    compiling = self.step.compile(self._batches(self.start)[0])
    if init is None:
      state = self.checkpoints.restore(self.start, self.step.like)
    else:
      state = init.result()()
      if (params := self._pretrained) is not None:
        shardings = jax.tree.map(lambda x: x.sharding, state['params'])
        params = hk.data_structures.merge(state['params'], params)
        state['params'] = jax.device_put(params, shardings)
    compiling.result()
    self.report.print(f'compiled in {time.perf_counter() - clock:.1f} s')
    if self.start:
      self.report.print(f'resumed from step {self.start:,}')
    return jax.block_until_ready(state)

  @property
  def _pretrained(self):
    try:
      return getattr(self.task, 'pretrained', None)
    except (ValueError, OSError) as error:
      raise Unusable(
        f'{self.workdir}: no intact checkpoint to resume from, and what the '
        f'run started from cannot be read again: {error}'
      ) from None

  def _train(self, state):
    """Train to the last step or until stopped; returns (steps done, state)."""
    watch, logged, done = Stopwatch(), self.start, self.start
    guard = Watch(
      self.step.trained, self.settings.max_bad_steps, self.report.print
    )
    if self.profile and done >= self.profile[1]:
      self.report.print(
        f'--profile: nothing to trace, as step {self.profile[1]:,} was done '
        'before this run resumed'
      )
    self.trace.at(done, state)
    while done < self.settings.steps:
      batches, count = self._batches(done)
      with watch.paused():
        program = self.step.compile(batches).result()
      state, values = self.step.run(program, state, batches, done, count)
      done += count
      self.report.advance(done)
      with watch.paused():
        self.trace.at(done, state)
      try:
        guard.note(values.pop('bad'), count)
        if done == self.settings.steps:
          guard.flush()
      except NotFinite:
        self._save(state, done)
        raise

      if self._is_due('log_every', done) or done == 1:
        values = {k: float(np.asarray(v)[count - 1]) for k, v in values.items()}
        seconds = watch.lap()
        with watch.paused():
          self._log(done, values, seconds, done - logged)
        logged = done

      is_evaluated = self._is_due('eval_every', done)
      is_saved = self._is_due('checkpoint_every', done)
      stopped_by = self.stop.poll(done)
      if is_evaluated or is_saved or stopped_by:
        # Finish the steps in flight, so that they count as training time.
        jax.block_until_ready(state)
        with watch.paused():
          if is_evaluated and not stopped_by:
            self._evaluate(state, done)
          if is_saved and not self.stop.name:
            self._save(state, done)
      if self.stop.name:
        break
    return done, state

  # Computed lazily: both take a second, which would delay the first step.
  @functools.cached_property
  def _flops(self):
    return flops.count_step(self.task, self.task.batch(self.start))

  @functools.cached_property
  def _board(self):
    if self.settings.tensorboard and processes.is_first():
      return self._open(TensorBoard(self.workdir / 'tb', self.start))
    return None

  def _is_due(self, key, done):
    every = getattr(self.settings, key)
    return done % every == 0 or done == self.settings.steps

  def _batches(self, done):
    """Return (stacked batches, their number) of the call after `done` steps."""
    batches = self.calls.batches(done)
    return self.step.stack(batches), len(batches)

  def _save(self, state, done):
    values = {}
    for line in self.metrics.lines:
      if line['step'] == done:
        values |= line
    self.checkpoints.save(done, state, values)

  def _log(self, done, values, seconds, steps):
    values['train/tokens_per_second'] = (
      steps * self.task.tokens_per_step / seconds
    )
    values['train/seconds_per_step'] = seconds / steps
    if done > 1:
      values |= self._measure_use(seconds / steps)
    self._write(done, values)
    self.report.log(done, values)

  def _measure_use(self, seconds):
    rate = self._flops / seconds
    use = {
      'train/flops_per_second': rate,
      'train/utilisation': flops.utilisation(rate, self.step.mesh),
      'train/memory_mib': memory.peak_mib(self.step.mesh),
    }
    return {k: v for k, v in use.items() if v is not None}

  def _write(self, done, values):
    with self._tolerance('metrics.jsonl'):
      self.metrics.write(done, values)
    with self._tolerance('tb'):
      if done > 1 and self._board:
        self._board.scalars(done, values)

  def _evaluate(self, state, done):
    """Evaluate the model, draw the loss curve and write an example."""
    try:
      with sharding.tracing_for(self.step.mesh):
        values = self.task.evaluate(state['params'], self._place_or_stop)
    except Interrupted:
      return  # the resumed run repeats this evaluation
    self._write(done, values)
    self.report.evaluated(done, values)
    params = processes.gather(state['params'])
    if processes.is_first():
      self._show(params, done)

  def _show(self, params, done):
    from attention import plots

    example = self.task.example(params, seed=done)
    path = self.workdir / 'samples' / f'{done:08d}.txt'
    self.report.print(
      f'{self.task.example_name}, saved to {path}:\n{example.strip()}\n'
    )
    with self._tolerance('samples and plots'):
      path.parent.mkdir(exist_ok=True)
      path.write_text(example)
      folder = self.workdir / 'plots'
      plots.loss_curve(
        self.metrics.lines, folder / 'loss.png', self.task.loss_unit
      )
      if hasattr(self.task, 'draw'):
        self.task.draw(folder)
      if self._board:
        self._board.sample(done, example)
        self._board.pictures(done, folder)

  def _place_or_stop(self, batch):
    if jax.process_count() == 1:
      self.stop.check()
    return self.step.place(batch)

  @contextlib.contextmanager
  def _tolerance(self, what):
    """Turn disk errors into warnings, so that they do not end the run."""
    try:
      yield
    except OSError as error:
      self.report.print(f'warning: {what} could not be written: {error}')


def _introduce(report, task, step):
  leaves = jax.tree.leaves(step.like['params'])
  count, trained = (
    sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    for tree in (leaves, step.trained)
  )
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  devices = jax.devices()
  shape = ' × '.join(f'{k} {v}' for k, v in step.mesh.shape.items() if v > 1)
  report.print(
    f'backend     {jax.default_backend()}, {len(devices)} × '
    f'{devices[0].device_kind}'
    + (f', mesh: {shape}' if shape else '')
    + (f', {n} processes' if (n := jax.process_count()) > 1 else '')
  )
  share = (
    ''
    if trained == count
    else (f', {trained:,} trained ({trained / count:.2%})')
  )
  report.print(f'parameters  {count:,} ({memory.format_bytes(size)}){share}')
  report.print(f'data        {task.describe()}')
