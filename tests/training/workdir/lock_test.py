"""The workdir lock: refuses a second process; leftover files do not lock."""

import os
import signal
import socket

import pytest

from attention.training.workdir import lock

_HOLD = """
import sys, time, pathlib
from attention.training.workdir import lock
with lock.held(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(600)
"""


def test_the_error_names_the_holder(tmp_path, python):
  holder = python('-c', _HOLD, tmp_path)
  assert holder.stdout.readline() == 'held\n'
  with (
    pytest.raises(
      lock.Locked,
      match=f'process {holder.pid} on {socket.gethostname()} is running here',
    ),
    lock.held(tmp_path),
  ):
    pass
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  with lock.held(tmp_path):
    assert str(os.getpid()) in (tmp_path / 'lock').read_text()


def test_a_leftover_lock_file_does_not_lock(tmp_path):
  (tmp_path / 'lock').write_text('{"host": "elsewhere", "process": 1}')
  with lock.held(tmp_path):
    assert str(os.getpid()) in (tmp_path / 'lock').read_text()
