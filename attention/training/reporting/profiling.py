"""Device profiles of selected steps: --profile=START:STOP."""

import pathlib

import jax


class Trace:
  """Records a trace of some steps, to view in TensorBoard or Perfetto."""

  def __init__(self, folder: pathlib.Path, span: tuple[int, int] | None):
    """Create a trace.

    Args:
      folder: where the trace is written.
      span: (start, stop), the numbers of completed steps at which the trace
        starts and stops; None for no trace. A run that resumes between them
        starts the trace there.
    """
    self._folder, self._span, self._is_on = folder, span, False

  def at(self, done: int, state) -> None:
    """Start or stop the trace if due after `done` steps; waits for `state`."""
    if not self._span:
      return
    start, stop = self._span
    is_on = start <= done < stop
    if is_on == self._is_on:
      return
    jax.block_until_ready(state)
    if is_on:
      jax.profiler.start_trace(str(self._folder))
      self._is_on = True
    else:
      self.close()

  def close(self) -> None:
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()
