"""How a run is stopped: by SIGTERM or Ctrl-C, all its processes together."""

import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
_SHOW_CURSOR = b'\x1b[?25h'  # which a progress bar hides
# Processes ask each other every so many steps: it makes them wait.
_ASKED_EVERY = 10


class Interrupted(Exception):
  """Raised out of what is best not finished, where a run is to stop."""


class StopSignals:
  """Notes SIGINT and SIGTERM; a second one stops at once."""

  def __init__(self):
    self._caught = 0
    self._agreed = 0
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in _SIGNALS:
        self._before[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  @property
  def name(self) -> str | None:
    """What stops this run, if anything does; agreed by all processes."""
    agreed = self._caught if jax.process_count() == 1 else self._agreed
    return _SIGNALS[agreed] if agreed else None

  def ask(self, step: int) -> str | None:
    """`name`, after the processes asked each other: all call it together."""
    if jax.process_count() > 1 and step % _ASKED_EVERY == 0:
      caught = multihost_utils.process_allgather(np.int32(self._caught))
      self._agreed = int(caught.max())
    return self.name

  def check(self) -> None:
    """Raises Interrupted where the run is to stop."""
    if self.name:
      raise Interrupted

  def _catch(self, number, _):
    if self._caught:
      # Not by an exception: a compilation under way would be waited for. What
      # is on disk is whole at any moment.
      if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
      os._exit(128 + number)
    self._caught = int(number)
