"""Stopping all processes of a run together, on SIGTERM or Ctrl-C."""

import os
import signal
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}
_SHOW_CURSOR = b'\x1b[?25h'  # the progress bar hides the cursor
# Steps between exchanges of signals; each exchange makes the processes wait.
_POLLED_EVERY = 10


class Interrupted(Exception):
  """Raised to abandon unfinished work when a run has to stop."""


class StopSignals:
  """Records SIGINT and SIGTERM; a second signal exits at once."""

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
    """Name of the signal that stops the run, agreed by all processes."""
    agreed = self._caught if jax.process_count() == 1 else self._agreed
    return _SIGNALS[agreed] if agreed else None

  def poll(self, step: int) -> str | None:
    """Exchange signals and return `name`. All processes must call this."""
    if jax.process_count() > 1 and step % _POLLED_EVERY == 0:
      caught = multihost_utils.process_allgather(np.int32(self._caught))
      self._agreed = int(caught.max())
    return self.name

  def check(self) -> None:
    """Raise Interrupted if the run has to stop."""
    if self.name:
      raise Interrupted

  def _catch(self, number, _):
    if self._caught:
      # An exception would wait for a running compilation. Exiting here is safe
      # because the files on disk are valid at any moment.
      if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
      os._exit(128 + number)
    self._caught = int(number)
