"""The report of `python -m attention inspect --device`."""

import sys
import time

import jax

from attention.training.devices import fitting, hlo
from attention.training.devices.programs import Program, Training, lowering_for
from attention.training.parallelism import sharding
from attention.training.reporting import flops, memory

_CAP = 1024  # largest batch size considered, as a multiple of the config's


def of_training(config, task, target, seconds: float):
  """Report the memory and operations of a training step, and the largest batch.

  Args:
    config: the run's config.
    task: the config's task.
    target: the devices to compile for.
    seconds: time budget for compiling other batch sizes to find the largest.

  Yields:
    Lines of text.

  Raises:
    ValueError: the mesh does not fit the devices or the batch, or the step does
      not compile for them.
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
  yield 'per step and device'
  count = flops.count_step(task, training.batch) // mesh.size
  yield _row('model FLOPs', f'{count:,}')
  if program.text:
    yield from _counts(hlo.count(program.text))
  yield ''
  yield 'memory per device, by batch size'
  points = {0: memory.bytes_per_device(training.step.like), rows: program.total}
  yield _fit(rows, program, target)
  limits = target.usable, training.unit, _CAP * rows
  while (largest := fitting.largest(points, *limits)) not in points:
    if time.monotonic() + took > end:
      yield _row('largest batch, estimated (see --seconds)', f'{largest:,}')
      return
    program, _ = _timed(training, largest)
    points[largest] = program.total
    yield _fit(largest, program, target)
  more = ' or more' if largest == limits[-1] else ''
  yield _row('largest batch', f'{largest:,}{more}')


def of_decoding(task, target):
  """Report decoding on one device, for batch size 1 after half a context.

  Args:
    task: the config's task.
    target: the devices; only one of them is used.

  Yields:
    Lines of text.

  Raises:
    ValueError: the task does not generate text, or the program does not
      compile.
  """
  if not hasattr(task, 'lower_decoding'):
    raise ValueError('--decode: expected a task that generates text')
  mesh = sharding.make_mesh(1, devices=target.devices[:1])
  params = sharding.of_state(jax.eval_shape(task.init, jax.random.key(0)), mesh)
  with lowering_for(mesh):
    lowered, cache = task.lower_decoding(params)
  program = Program.compile(lowered, target)
  weights = memory.bytes_per_device(params)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  yield f'decoding on {target.kind}'
  yield from _memory(program, target, 'weights and prompt')
  yield ''
  yield 'per token'
  yield _row('weights', memory.format_bytes(weights))
  yield _row('cache', memory.format_bytes(held))
  if program.text:
    before = hlo.count(program.text, turns=0).kernels
    each = hlo.count(program.text, turns=1).kernels - before
    yield _row('kernels', f'{each:,}')
    yield _row('kernels before the first token', f'{before:,}')


def _timed(training, rows):
  """Compile the step; returns the program and the seconds it took."""
  print(f'compiling for batch size {rows:,} …', file=sys.stderr, flush=True)
  begun = time.monotonic()
  return training.compile(rows), time.monotonic() - begun


def _memory(program, target, arguments):
  yield ''
  yield 'memory per device'
  yield _row('total', memory.format_bytes(target.memory))
  if target.share < 1:
    yield _row(
      f'available to programs, {target.share:.0%}',
      memory.format_bytes(target.usable),
    )
  if program.arguments:
    yield _row(arguments, memory.format_bytes(program.arguments))
  yield _row('temporaries', memory.format_bytes(program.temporaries))
  left = target.usable - program.total
  yield _row('free' if left >= 0 else 'missing', memory.format_bytes(abs(left)))


def _counts(counts):
  yield _row('kernels', f'{counts.kernels:,}')
  yield _row('of which copies', f'{counts.copies:,}')
  for kind, (number, size) in counts.collectives.items():
    yield _row(f'{number:,} × {kind}', memory.format_bytes(size))


def _fit(rows, program, target):
  fits = 'fits' if program.total <= target.usable else 'does not fit'
  return _row(f'{rows:,} {fits}', memory.format_bytes(program.total))


def _row(name, value):
  return f'  {name:<42}{value:>20}'
