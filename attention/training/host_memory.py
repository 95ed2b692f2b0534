"""Memory that a process on a CPU keeps between programs."""

import ctypes
import importlib.util

import jax

# Parameters of mallopt(3), from malloc.h, and its largest value.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
  """Let malloc keep freed memory, and return whether it does.

  On CPUs, XLA allocates the temporaries of a program anew for each call. By
  default, glibc returns large blocks to the system when they are freed, and the
  system clears their pages again when they are next used, which can take a
  third of a step. A process that keeps them holds its peak memory until it
  ends. Compilation takes longer, as all its threads share an arena.

  Call this before JAX is used: threads that have an arena of their own, which
  is too small for large blocks, keep it. Nothing changes where JAX may use an
  accelerator, whose host has other work for several arenas.
  """
  if not _uses_cpus():
    return False
  try:
    set_option = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):  # not glibc
    return False
  return all(
    set_option(name, value)
    for name, value in (
      (_ARENA_MAX, 1),
      (_MMAP_THRESHOLD, _LARGEST),
      (_TRIM_THRESHOLD, _LARGEST),
    )
  )


def _uses_cpus():
  if platforms := jax.config.jax_platforms:
    return platforms == 'cpu'
  return not any(map(importlib.util.find_spec, ('jax_plugins', 'libtpu')))
