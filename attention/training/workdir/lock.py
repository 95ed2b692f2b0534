"""A lock that allows one run per workdir and names its holder."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket

from attention.training.workdir import Unusable


class Locked(Unusable):
  """Raised if another process is running in the workdir."""


@contextlib.contextmanager
def held(workdir: pathlib.Path):
  """Hold workdir/lock, creating the file if necessary.

  The operating system releases the lock when the holding process ends for any
  reason, so a leftover file does not lock the workdir.

  Raises:
    Locked: another process holds the lock; the message names host and process.
    Unusable: the folder cannot be created or written to.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    opened = (workdir / 'lock').open('a+')
  except OSError as error:
    raise Unusable(
      f'--workdir: expected a folder that can be written to, got {workdir} '
      f'({error.strerror})'
    ) from None
  with opened as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise Locked(
        f'{workdir}: {_holder(file)}; stop it first, or choose '
        'another --workdir'
      ) from None
    file.truncate(0)
    json.dump({'host': socket.gethostname(), 'process': os.getpid()}, file)
    file.flush()
    yield


def _holder(file) -> str:
  file.seek(0)
  try:
    holder = json.load(file)
    process, host = holder['process'], holder['host']
    return f'process {process} on {host} is running here'
  except ValueError:  # the holder has not written its record yet
    return 'another process is running here'
