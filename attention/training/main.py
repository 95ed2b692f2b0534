"""What `python train.py` does."""

import os
import pathlib
import shlex
import sys

import jax

from attention.training import flags, guard, lock, loop


def main(argv: list[str]) -> int:
  """Trains; returns the exit status: 2 for a mistake of the user's."""
  try:
    arguments = flags.parse(argv)
    config = arguments.config
    set_up_jax(config.training.cpu_devices)
    run = loop.prepare(config, arguments.workdir, shlex.join(['python', *argv]))
  except (ValueError, OSError) as error:
    return complain(error)
  try:
    run()
  except lock.Locked as error:
    return complain(error)
  except guard.NotFinite as error:
    complain(error)
    return 1
  return 0


def complain(error: Exception) -> int:
  """Says in one line what is wrong; returns exit status 2."""
  message = str(error)
  if isinstance(error, OSError) and error.filename is not None:
    message = f'{error.filename}: {error.strerror}'
  print('error: ' + ' '.join(message.split()), file=sys.stderr)
  return 2


def set_up_jax(cpu_devices: int | None = None) -> None:
  """JAX's compilation cache on; on CPU, that many devices share a batch."""
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')
    path = pathlib.Path(home) / 'attention' / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  is_set = 'xla_force_host_platform_device_count' in os.environ.get(
    'XLA_FLAGS', ''
  )
  if cpu_devices and not is_set:
    jax.config.update('jax_num_cpu_devices', cpu_devices)
