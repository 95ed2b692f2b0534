"""The lines that `python -m attention inspect --device` prints."""

import sys
import time

import jax

from attention.training.devices import fitting, hlo
from attention.training.devices.programs import Program, Training, described
from attention.training.parallelism import sharding
from attention.training.reporting import flops, memory

_CAP = 1024  # times the config's batch: no larger one is looked for


def of_training(config, task, target, seconds: float):
  """What a config's training step takes of a device, and which batch fits.

  Args:
    config: of the run.
    task: of the config.
    target: the devices, to make the mesh of.
    seconds: within which other batches are compiled, to find the largest.

  Yields:
    Lines of text.

  Raises:
    ValueError: a mesh that the devices or the batch don't fit, or a step that
      doesn't compile for them.
  """
  end = time.monotonic() + seconds
  training = Training(config, task, target)
  mesh, rows = training.mesh, training.rows
  axes = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  yield (
    f'training step on {mesh.size} of {len(target.devices)} × {target.kind}: '
    f'{axes}'
  )
  program, took = _timed(training, rows)
  yield from _memory(program, target, 'parameters, optimizer state, batch')
  yield ''
  yield 'a step, on a device'
  count = flops.count_step(task, training.batch) // mesh.size
  yield _row('model FLOPs', f'{count:,}')
  if program.text:
    yield from _counts(hlo.count(program.text))
  yield ''
  yield 'memory of a device, by batch'
  points = {0: memory.bytes_per_device(training.step.like), rows: program.total}
  yield _fit(rows, program, target)
  limits = target.usable, training.unit, _CAP * rows
  while (largest := fitting.largest(points, *limits)) not in points:
    if time.monotonic() + took > end:
      yield _row('largest that fits, about (see --seconds)', f'{largest:,}')
      return
    program, _ = _timed(training, largest)
    points[largest] = program.total
    yield _fit(largest, program, target)
  more = ' or more' if largest == limits[-1] else ''
  yield _row('largest that fits', f'{largest:,}{more}')


def of_decoding(task, target):
  """What writing takes of a device: a batch of one, after half a context.

  Args:
    task: of the config.
    target: the devices, of which one writes.

  Yields:
    Lines of text.

  Raises:
    ValueError: a task that doesn't write, or a program that doesn't compile.
  """
  if not hasattr(task, 'lower_decoding'):
    raise ValueError('--decode: expected a task that writes a text')
  mesh = sharding.make_mesh(1, devices=target.devices[:1])
  params = sharding.of_state(jax.eval_shape(task.init, jax.random.key(0)), mesh)
  with described(mesh):
    lowered, cache = task.lower_decoding(params)
  program = Program.compile(lowered, target)
  weights = memory.bytes_per_device(params)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  yield f'writing on {target.kind}'
  yield from _memory(program, target, 'weights and prompt')
  yield ''
  yield 'a token'
  yield _row('weights', memory.format_bytes(weights))
  yield _row('cache', memory.format_bytes(held))
  if program.text:
    before = hlo.count(program.text, turns=0).kernels
    each = hlo.count(program.text, turns=1).kernels - before
    yield _row('kernels', f'{each:,}')
    yield _row('kernels before the first', f'{before:,}')


def _timed(training, rows):
  """A program, and the seconds it took."""
  print(f'compiling for a batch of {rows:,} …', file=sys.stderr, flush=True)
  begun = time.monotonic()
  return training.compile(rows), time.monotonic() - begun


def _memory(program, target, arguments):
  yield ''
  yield 'memory of a device'
  yield _row('all', memory.format_bytes(target.memory))
  if target.share < 1:
    yield _row(
      f'for programs, {target.share:.0%}', memory.format_bytes(target.usable)
    )
  if program.arguments:
    yield _row(arguments, memory.format_bytes(program.arguments))
  yield _row('temporaries', memory.format_bytes(program.temporaries))
  left = target.usable - program.total
  yield _row('left' if left >= 0 else 'lacking', memory.format_bytes(abs(left)))


def _counts(counts):
  yield _row('kernels', f'{counts.kernels:,}')
  yield _row('of them copies', f'{counts.copies:,}')
  for kind, (number, size) in counts.collectives.items():
    yield _row(f'{number:,} × {kind}', memory.format_bytes(size))


def _fit(rows, program, target):
  fits = 'fits' if program.total <= target.usable else "doesn't fit"
  return _row(f'{rows:,} {fits}', memory.format_bytes(program.total))


def _row(name, value):
  return f'  {name:<42}{value:>20}'
