"""How much a step computes, and how much of what a device could."""

import math
import os

import jax

from attention.ops import platforms

# Multiplications and additions a second, of dense matrices at the precision
# that a device is fastest in for training (bfloat16), by its makers' sheets.
_PEAKS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
}


def of_step(task, batch) -> int:
  """Model FLOPs of a training step: of all matrix products.

  The gradient of a product is two more, so that a step is three times the
  loss; what is computed again to save memory does not count, as usual
  (Chowdhery et al. 2022, "PaLM", appendix B).
  """
  params = jax.eval_shape(task.init, jax.random.key(0))
  program = jax.make_jaxpr(task.loss)(params, jax.random.key(0), batch)
  return 3 * _count(program.jaxpr)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      total += _of_product(equation)
      continue
    if found := platforms.find(equation):
      total += _of_attention(*found)
      continue
    times = equation.params.get('length', 1)  # of a scan
    inner = jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: _jaxpr(x) is not None
    )
    counts = [_count(_jaxpr(x)) for x in inner if _jaxpr(x) is not None]
    if equation.primitive.name == 'cond':
      counts = [max(counts)]
    total += times * sum(counts)
  return total


def _of_attention(method, shapes, times):
  """Of queries with keys and of weights with values, none of them masked."""
  query, key, value, *_ = shapes
  forward = 2 * math.prod(query[:-1]) * key[-3] * (query[-1] + value[-1])
  return times * forward * (1 if method == 'forward' else 2)


def _jaxpr(x):
  x = getattr(x, 'jaxpr', x)
  return x if hasattr(x, 'eqns') else None


def _of_product(equation):
  left = equation.invars[0].aval.shape
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.outvars[0].aval.shape
  return 2 * math.prod(shape) * math.prod(left[axis] for axis in contracted)


def utilisation(flops_per_second: float, mesh) -> float | None:
  """The part of what a mesh could compute, or None where it isn't known."""
  kind = mesh.devices.flat[0].device_kind
  for name, peak in _PEAKS.items():
    if kind.startswith(name):
      return flops_per_second / (peak * mesh.size)
  return None


def check_memory(state, mesh) -> None:
  """Checks that the devices can hold a state at all; more comes to it.

  Args:
    state: a tree of shapes with shardings.
    mesh: of the devices; on CPU they share the host's memory.

  Raises:
    ValueError: they can't.
  """
  needed = bytes_a_device(state)
  device, *others = mesh.local_devices
  if device.platform == 'cpu':
    needed *= 1 + len(others)
    there = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  else:
    there = (device.memory_stats() or {}).get('bytes_limit', math.inf)
  if needed > there:
    raise ValueError(
      f'model: parameters and optimizer state take {show_bytes(needed)}, where '
      f'{"this host" if device.platform == "cpu" else "a device"} has '
      f'{show_bytes(there)}; python -m attention inspect shows what takes it'
    )


def bytes_a_device(tree) -> int:
  """What a device holds of a tree of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def show_bytes(count: int) -> str:
  """Such as 1.5 GiB."""
  for size, name in ((2**30, 'GiB'), (2**20, 'MiB'), (2**10, 'KiB')):
    if count >= size:
      return f'{count / size:,.1f} {name}'
  return f'{count} B'


def memory_mib(mesh) -> float | None:
  """What the fullest device of this process held at most, where it tells."""
  peaks = [
    (device.memory_stats() or {}).get('peak_bytes_in_use')
    for device in mesh.local_devices
  ]
  return max(peaks) / 2**20 if peaks and None not in peaks else None
