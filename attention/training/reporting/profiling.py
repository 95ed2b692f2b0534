"""What the devices did, step by step: --profile=START:STOP."""

import pathlib

import jax


class Trace:
  """Traces some steps of a run, for TensorBoard or Perfetto to show."""

  def __init__(self, folder: pathlib.Path, span: tuple[int, int] | None):
    """Takes the steps done before it begins, and when it ends."""
    self._folder, self._span, self._is_on = folder, span, False

  def at(self, done: int, state) -> None:
    """Begins or ends, after so many steps, of which `state` is the result."""
    if self._span and done in self._span:
      jax.block_until_ready(state)
      if done == self._span[0]:
        jax.profiler.start_trace(str(self._folder))
        self._is_on = True
      else:
        self.close()

  def close(self) -> None:
    if self._is_on:
      self._is_on = False
      jax.profiler.stop_trace()
