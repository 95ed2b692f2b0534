"""Groups the steps of a run into calls of its compiled program."""

import numpy as np


class Calls:
  """Gives the batches of each call.

  A call ends before a batch of other shapes, and at each step that something
  follows: a line of the log, an evaluation, a checkpoint or a trace.
  """

  def __init__(self, task, settings, ends=()):
    """Create the calls of a run.

    Args:
      task: the task; `task.batch(n)` is the batch of step n, counted from 0.
      settings: `config.training` as a `TrainingConfig`.
      ends: further numbers of completed steps at which a call ends.
    """
    self._task = task
    self._multiples = (
      settings.steps_per_call,
      settings.log_every,
      settings.eval_every,
      settings.checkpoint_every,
    )
    # The first step is logged on its own.
    self._ends = (1, settings.steps, *ends)
    self._newest = (None, None)

  def batches(self, done: int) -> list[dict]:
    """Return the batches of the call after `done` steps."""
    ends = [every * (done // every + 1) for every in self._multiples]
    end = min(ends + [end for end in self._ends if end > done])
    batches = [self._batch(done)]
    for n in range(done + 1, end):
      batch = self._batch(n)
      if _shapes(batch) != _shapes(batches[0]):
        break
      batches.append(batch)
    return batches

  def _batch(self, n):
    """Return a batch, which the call before may have made already."""
    if self._newest[0] != n:
      self._newest = (n, self._task.batch(n))
    return self._newest[1]


def _shapes(batch):
  return {name: np.shape(x) for name, x in batch.items()}
