"""Checkpoints of a run, by orbax: checkpoints/<step>/."""

import pathlib

import jax
import orbax.checkpoint as ocp


class Checkpoints:
  """Saves and restores a state {'params': …, 'optimizer': …} by step."""

  def __init__(self, directory: pathlib.Path, num_kept: int = 3):
    self._manager = ocp.CheckpointManager(
      # orbax wants an absolute path.
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=num_kept, create=True, cleanup_tmp_directories=True
      ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: dict) -> None:
    """Copies the state; the writing goes on in the background."""
    if step == self.latest_step():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardSave(part) for name, part in state.items()}
      ),
      force=True,
    )

  def restore(self, step: int, like: dict) -> dict:
    """The state at `step`: the parts, shapes and shardings of `like`."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(part) for name, part in like.items()}
      ),
    )
    return {name: restored[name] for name in like}

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def abstract(shapes, sharding):
  """A tree of shapes and dtypes to restore into, each with a sharding."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
  )
