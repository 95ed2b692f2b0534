"""Entry point of `python train.py`."""

import contextlib
import os
import shlex
import sys

import jax

from attention.training import (
  command_line,
  compilation_cache,
  host_memory,
  loop,
)
from attention.training.optimization import nonfinite
from attention.training.parallelism import processes
from attention.training.workdir import Unusable

# Avoid atomic additions, and choose the same kernels in every run.
_DETERMINISTIC = (
  '--xla_gpu_deterministic_ops=true',
  '--xla_gpu_autotune_level=0',
)


def main(argv: list[str]) -> int:
  """Train a config; returns the exit status, 2 for a usage error."""
  if {'--help', '-h'} & set(argv[1:]):
    print(command_line.usage())
    return 0
  try:
    arguments = command_line.parse(argv)
    config = arguments.config
    set_up_jax(
      config.training.cpu_devices,
      config.training.deterministic,
      config.training.keep_memory,
    )
    processes.start(
      arguments.coordinator, arguments.num_processes, arguments.process_id
    )
    run = loop.prepare(
      config,
      arguments.workdir,
      command=shlex.join(['python', *argv]),
      profile=arguments.profile,
    )
  except (ValueError, OSError) as error:
    return print_error(error)
  try:
    run()
  except Unusable as error:
    return print_error(error)
  except nonfinite.NotFinite as error:
    print_error(error)
    return 1
  return 0


def print_error(error: Exception) -> int:
  """Print an error on one line of standard error; returns exit status 2."""
  message = str(error)
  if isinstance(error, OSError) and error.filename is not None:
    message = f'{error.filename}: {error.strerror}'
  print('error: ' + ' '.join(message.split()), file=sys.stderr)
  return 2


def set_up_jax(
  cpu_devices: int = 0,
  is_deterministic: bool = False,
  keeps_memory: bool = False,
) -> None:
  """Configure JAX, its compilation cache and the memory of the host.

  Call this before JAX is used.

  Args:
    cpu_devices: number of virtual CPU devices, if there is no accelerator.
    is_deterministic: use only kernels that give the same bits in every run.
      This matters on GPU, where it costs some speed; all kernels on CPU and TPU
      are deterministic.
    keeps_memory: see `host_memory.keep_freed_memory`.
  """
  compilation_cache.use_cache()
  if keeps_memory:
    host_memory.keep_freed_memory()
  given = os.environ.get('XLA_FLAGS', '')
  if cpu_devices and 'xla_force_host_platform_device_count' not in given:
    with contextlib.suppress(RuntimeError):  # JAX has been used before
      jax.config.update('jax_num_cpu_devices', cpu_devices)
  if is_deterministic:
    os.environ['XLA_FLAGS'] = ' '.join([given, *_DETERMINISTIC]).strip()
