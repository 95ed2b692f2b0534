"""Device memory: bytes that a state needs, and peak usage."""

import math
import os

import jax


def check_fits(state, mesh) -> None:
  """Check that the devices can hold a state; temporaries are not counted.

  Args:
    state: a tree of shapes with shardings.
    mesh: the devices; virtual CPU devices share the host's memory.

  Raises:
    ValueError: the state does not fit in memory.
  """
  needed = bytes_per_device(state)
  device, *others = mesh.local_devices
  if device.platform == 'cpu':
    needed *= 1 + len(others)
    there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  else:
    there = (device.memory_stats() or {}).get('bytes_limit', math.inf)
  if needed > there:
    raise ValueError(
      'model: expected parameters and optimizer state of at most '
      f'{format_bytes(there)}, the memory of '
      f'{"this host" if device.platform == "cpu" else "one device"}, got '
      f'{format_bytes(needed)}; python -m attention inspect lists the sizes'
    )


def bytes_per_device(tree) -> int:
  """Return the bytes that a tree of sharded shapes takes on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def format_bytes(count: int) -> str:
  """Format a size with its unit, such as '1.5 GiB'."""
  for size, name in ((2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if count >= size:
      return f'{count / size:,.1f} {name}'
  return f'{count} B'


def peak_mib(mesh) -> float | None:
  """Return the peak MiB of this process's fullest device, None if unknown."""
  peaks = [
    (device.memory_stats() or {}).get('peak_bytes_in_use')
    for device in mesh.local_devices
  ]
  return max(peaks) / 2**20 if peaks and None not in peaks else None
