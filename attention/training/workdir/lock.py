"""One run a workdir: a lock that names its holder."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket


class Locked(ValueError):
  """Another process runs in this workdir."""


@contextlib.contextmanager
def held(workdir: pathlib.Path):
  """Holds workdir/lock, made if it isn't there.

  The system lets go of it with the process that held it, however that ended:
  a file left behind is no lock.

  Raises:
    Locked: says which host and process holds it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'lock').open('a+') as file:
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
    return f'process {holder["process"]} on {holder["host"]} runs here'
  except ValueError:  # it has only just taken the lock
    return 'another process runs here'
