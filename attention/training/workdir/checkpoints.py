"""Checkpoints of a run, by orbax: checkpoints/<step>/."""

import contextlib
import errno
import logging
import math
import pathlib
import shutil
import threading

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from attention.training.workdir import digests

# What a disk that is full, read-only or gone makes orbax raise.
_FAILURES = (OSError, ValueError, RuntimeError)


class _NotOrbax(logging.Filter):
  """Keeps orbax's troubles, which `warn` tells in a line, from being logged."""

  def filter(self, record):
    return 'orbax' not in record.pathname + record.getMessage()


for _name in ('absl', 'asyncio'):
  logging.getLogger(_name).addFilter(_NotOrbax())


def has_any(directory: pathlib.Path) -> bool:
  """Whether a step was ever saved in a folder, even one damaged since."""
  return any(
    path.name == 'damaged' or path.name.isdigit()
    for path in (directory.iterdir() if directory.is_dir() else ())
  )


class Checkpoints:
  """Saves and restores a state {'params': …, 'optimizer': …} by step.

  A step is written as <step>.part and gets its name when all of it and its
  manifest are there. One that isn't as it was written is set aside, under
  damaged/, and the one before it serves.
  """

  def __init__(self, directory: pathlib.Path, num_kept: int = 0, warn=print):
    """Looks after a folder of checkpoints.

    Args:
      directory: made if there is something to save.
      num_kept: how many of the newest stay, beside the best; 0: this process
        only reads, so that nothing is saved, moved or removed.
      warn: is told in a line what went wrong.
    """
    self._directory = directory.absolute()  # as orbax wants it
    self._num_kept, self._warn = num_kept, warn
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(handler_registry=_handlers())
    )
    self._saving: threading.Thread | None = None
    self._saved: int | None = None
    if self._is_writer:
      self._remove_unfinished()

  @property
  def _is_writer(self):
    return self._num_kept > 0 and jax.process_index() == 0

  def latest_step(self) -> int | None:
    """The newest step whose files are as they were written, or None."""
    step = self._find_newest() if jax.process_index() == 0 else None
    if jax.process_count() > 1:
      step = -1 if step is None else step
      step = int(multihost_utils.broadcast_one_to_all(step))
      step = None if step < 0 else step
    self._saved = step
    return step

  def save(self, step: int, state: dict, values: dict | None = None) -> None:
    """Copies the state; the writing goes on in the background.

    What goes wrong with the disk is told and not raised.

    Args:
      step: of the state.
      state: a dict of trees of arrays, each part to be restored by itself.
      values: what was measured at this step; the lowest 'eval/loss' is best.
    """
    if step == self._saved:
      return
    self.wait()
    part = self._directory / f'{step}.part'
    try:
      if self._is_writer and jax.process_count() == 1:
        self._check_room(state)
      self._checkpointer.save(
        part,
        args=ocp.args.Composite(
          **{name: ocp.args.PyTreeSave(tree) for name, tree in state.items()}
        ),
      )
    except _FAILURES as error:
      self._give_up(part, step, error)
      return
    self._saving = threading.Thread(
      target=self._finish, args=(part, step, values or {})
    )
    self._saving.start()

  def restore(self, step: int, like: dict) -> dict:
    """The state at `step`: the parts, shapes and shardings of `like`."""
    restored = self._checkpointer.restore(
      self._directory / str(step),
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(part) for name, part in like.items()}
      ),
    )
    return {name: restored[name] for name in like}

  def restore_all(self, step: int) -> dict:
    """All parts of the state at `step` as they were saved, on one device."""
    folder = self._directory / str(step)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts = [p.name for p in folder.iterdir() if (p / '_METADATA').is_file()]
    restored = self._checkpointer.restore(
      folder,
      args=ocp.args.Composite(
        **{
          name: ocp.args.StandardRestore(fallback_sharding=device)
          for name in parts
        }
      ),
    )
    return {name: jax.device_put(restored[name], device) for name in parts}

  def wait(self) -> None:
    """Waits until everything is on disk."""
    if self._saving:
      self._saving.join()
      self._saving = None

  def close(self) -> None:
    """Waits until everything is on disk, and stops."""
    self.wait()
    with contextlib.suppress(*_FAILURES):  # told already
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
      where = f'; set aside in {target}'
    self._warn(f'warning: checkpoint {step:,} is damaged ({reason}){where}')

  def _check_room(self, state):
    """Raises OSError where a save would fail half-way, and at length."""
    leaves = jax.tree.leaves(state)
    # With what else a save writes: a guess on the safe side.
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

  def _finish(self, part, step, values):
    try:
      self._checkpointer.wait_until_finished()
      if self._is_writer:
        digests.write(part, {'step': step, 'values': values})
        part.rename(self._directory / str(step))
        self._remove_old()
      self._saved = step
    except _FAILURES as error:
      self._give_up(part, step, error)

  def _give_up(self, part, step, error):
    if self._is_writer:
      self._remove_unfinished()
    last = 'there is none yet' if self._saved is None else f'{self._saved:,}'
    reason = ' '.join(str(error).split())[:200]
    self._warn(
      f'warning: checkpoint {step:,} could not be written ({reason}); '
      f'the run goes on, its last checkpoint: {last}'
    )

  def _remove_unfinished(self):
    for leftover in self._directory.glob('*.part*'):
      if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
      else:
        with contextlib.suppress(OSError):
          leftover.unlink()

  def _remove_old(self):
    steps = self._steps()
    losses = {step: self._loss(step) for step in steps}
    kept = {*steps[-self._num_kept :], min(steps, key=losses.get)}
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
  """Orbax's handlers, with one of trees that takes half the time to save one.

  By itself it cuts every array up, to write a share from each copy, and notes
  where each array lay, which we tell whenever we restore.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    use_replica_parallel=False, enable_write_sharding_file=False
  )
  handler = ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    )
  )
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add(None, ocp.args.PyTreeSave, handler)
  return registry


def abstract(shapes, sharding):
  """A tree of shapes and dtypes to restore into, each with a sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )
