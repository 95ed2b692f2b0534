"""Checkpoints of a run, written with orbax to checkpoints/<step>/."""

import contextlib
import errno
import logging
import math
import pathlib
import shutil
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from attention.training.workdir import digests

# Exceptions that orbax raises for a full, read-only or missing disk.
_FAILURES = (OSError, ValueError, RuntimeError)


class _OrbaxFilter(logging.Filter):
  """Drops orbax's log records; `warn` reports its failures in one line."""

  def filter(self, record):
    return 'orbax' not in record.pathname + record.getMessage()


for _name in ('absl', 'asyncio'):
  logging.getLogger(_name).addFilter(_OrbaxFilter())


def has_any(directory: pathlib.Path) -> bool:
  """Whether a folder has a checkpoint, including damaged ones."""
  return any(
    path.name == 'damaged' or path.name.isdigit()
    for path in (directory.iterdir() if directory.is_dir() else ())
  )


class Checkpoints:
  """Saves and restores a state {'params': …, 'optimizer': …} by step.

  A checkpoint is written as <step>.part and renamed once it is complete and has
  a manifest. A checkpoint that no longer matches its manifest is moved to
  damaged/, and the previous one is used instead.
  """

  def __init__(self, directory: pathlib.Path, num_kept: int = 0, warn=print):
    """Manage a folder of checkpoints.

    Args:
      directory: the folder, created by the first save.
      num_kept: number of newest checkpoints to keep, besides the best one. 0
        means read-only: nothing is saved, moved or removed.
      warn: called with one line of text when something goes wrong.
    """
    self._directory = directory.absolute()  # orbax requires absolute paths
    self._num_kept, self._warn = num_kept, warn
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(handler_registry=_handlers())
    )
    self._saving: threading.Thread | None = None
    self.saved: int | None = None  # the newest step that is on disk
    if self._is_writer:
      self._remove_unfinished()

  @property
  def _is_writer(self):
    return self._num_kept > 0 and jax.process_index() == 0

  def latest_step(self) -> int | None:
    """Return the newest step with intact files, or None."""
    step = self._find_newest() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
      step = -1 if step is None else step
      step = int(multihost_utils.broadcast_one_to_all(step))
      step = None if step < 0 else step
    self.saved = step
    return step

  def save(self, step: int, state: dict, values: dict | None = None) -> None:
    """Copy the state and write it in the background.

    Disk errors are reported with `warn`, not raised.

    Args:
      step: the step of the state.
      state: a dict of trees of arrays; each entry can be restored separately.
      values: metrics of this step; the lowest 'eval/loss' marks the best
        checkpoint.
    """
    self.wait()
    if step == self.saved:
      return
    part = self._directory / f'{step}.part'
    if jax.process_count() == 1:
      state = _copy_to_host(state)
    else:  # processes write parts of arrays, and have to begin together
      try:
        self._begin(part, state)
      except _FAILURES as error:
        self._give_up(step, error)
        return
      state = None
    self._saving = threading.Thread(
      target=self._write, args=(part, step, state, values or {})
    )
    self._saving.start()

  def restore(self, step: int, like: dict) -> dict:
    """Restore a state with the parts, shapes and shardings of `like`."""
    restored = self._checkpointer.restore(
      self._directory / str(step),
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(part) for name, part in like.items()}
      ),
    )
    return {name: restored[name] for name in like}

  def wait(self) -> None:
    """Wait until everything is on disk."""
    if self._saving:
      self._saving.join()
      self._saving = None

  def close(self) -> None:
    """Wait until everything is on disk, and close the checkpointer."""
    self.wait()
    with contextlib.suppress(*_FAILURES):  # already reported
      self._checkpointer.close()

  def _steps(self) -> list[int]:
    names = (path.name for path in self._directory.glob('*'))
    return sorted(int(name) for name in names if name.isdigit())

  def _find_newest(self):
    for step in reversed(self._steps()):
      try:
        digests.check(self._directory / str(step))
      except (ValueError, OSError) as error:
        self._set_aside(step, error)
      else:
        return step
    return None

  def _set_aside(self, step, reason):
    where = ''
    if self._is_writer:
      aside = self._directory / 'damaged'
      aside.mkdir(exist_ok=True)
      names = (str(step), *(f'{step}.{n}' for n in range(1, 1_000_000)))
      target = next(t for t in map(aside.joinpath, names) if not t.exists())
      (self._directory / str(step)).rename(target)
      where = f'; moved to {target}'
    self._warn(f'warning: checkpoint {step:,} is damaged ({reason}){where}')

  def _check_room(self, state):
    """Raise OSError early if the disk has no room for a save."""
    leaves = jax.tree.leaves(state)
    # A conservative estimate that includes the metadata a save writes.
    size = sum(x.nbytes for x in leaves) * 5 // 4 + len(leaves) * 2**14
    self._directory.mkdir(exist_ok=True)
    probe = self._directory / 'room.part'
    probe.write_bytes(bytes(min(size, 2**20)))
    probe.unlink()
    free = shutil.disk_usage(self._directory).free
    if free < size:
      raise OSError(
        errno.ENOSPC, f'{size:,} bytes needed, {free:,} free', str(probe.parent)
      )

  def _begin(self, part, state):
    self._checkpointer.save(
      part,
      args=ocp.args.Composite(
        **{name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
      ),
    )

  def _write(self, part, step, state, values):
    """Write a state on the host, or wait for what `_begin` has begun."""
    try:
      if state is not None:
        self._check_room(state)
        self._begin(part, state)
      self._checkpointer.wait_until_finished()
      if self._is_writer:
        digests.write(part, {'step': step, 'values': values})
        part.rename(self._directory / str(step))
        self._remove_old(step)
      self.saved = step
    except _FAILURES as error:
      self._give_up(step, error)

  def _give_up(self, step, error):
    if self._is_writer:
      self._remove_unfinished()
    last = 'none' if self.saved is None else f'{self.saved:,}'
    reason = ' '.join(str(error).split())[:200]
    self._warn(
      f'warning: checkpoint {step:,} could not be written ({reason}); '
      f'training continues, last checkpoint: {last}'
    )

  def _remove_unfinished(self):
    for leftover in self._directory.glob('*.part*'):
      if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
      else:
        with contextlib.suppress(OSError):
          leftover.unlink()

  def _remove_old(self, saved):
    """Keep the newest, the best, and the one that was just saved."""
    steps = self._steps()
    losses = {step: self._loss(step) for step in steps}
    best = min(steps, key=losses.get)
    kept = {saved, *steps[-self._num_kept :]}
    if losses[best] < math.inf:
      kept.add(best)
    for step in steps:
      if step not in kept:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)

  def _loss(self, step):
    try:
      values = digests.read(self._directory / str(step))['values']
    except ValueError:
      return math.inf
    return values.get('eval/loss', math.inf)


def _handlers():
  """Orbax's handlers, with a tree handler that halves the time of a save.

  By default, orbax splits every array so that each replica writes a part, and
  records the shardings of the arrays. We always restore with explicit
  shardings, so neither is needed.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    use_replica_parallel=False, enable_write_sharding_file=False
  )
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
  )
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add(None, ocp.args.PyTreeSave, handler)
  return registry


def _copy_to_host(state):
  """Copy a state, whose arrays the next step donates."""
  state = jax.device_get(state)
  # On CPUs, these may be views of the arrays themselves.
  is_view = jax.default_backend() == 'cpu'
  return jax.tree.map(np.array, state) if is_view else state


def newest_params(workdir: pathlib.Path, shapes) -> tuple[int, dict]:
  """Return the newest step of a run, and its parameters on one device.

  In a run of several processes, each gets them on a device of its own.

  Args:
    workdir: folder of the run.
    shapes: the parameters' shapes and dtypes.

  Raises:
    ValueError: the run has no intact checkpoint, or one of other parameters.
  """
  directory = workdir / 'checkpoints'
  checkpoints = Checkpoints(directory) if directory.is_dir() else None
  step = checkpoints.latest_step() if checkpoints else None
  if step is None:
    kind = 'intact checkpoint' if has_any(directory) else 'checkpoint yet'
    raise ValueError(f'{workdir}: no {kind}; train it further first')
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = {'params': abstract(shapes, device)}
  try:
    return step, checkpoints.restore(step, like)['params']
  except ValueError as error:
    reason = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{workdir}: config.json does not fit checkpoint {step:,} ({reason})'
    ) from None


def abstract(shapes, sharding):
  """Return a tree of shapes and dtypes to restore into, with this sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )
