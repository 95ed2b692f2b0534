"""Host memory that is kept between steps."""

import ctypes

# Parameters of mallopt(3), from malloc.h, and its largest value.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
  """Let malloc keep freed memory; returns whether it does. Call this early.

  On CPUs, XLA allocates the temporaries of a program anew for each call. By
  default, glibc returns large blocks to the system when they are freed, and the
  system clears each page again when it is next used, which can take as long as
  half of a step. Kept blocks need a single arena: the others are too small.
  """
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
