"""Measure the cost of a checkpoint every 100 steps, for the default gpt_char.

  python benchmarks/checkpoints.py --rounds=10

Each round trains 100 steps with a checkpoint, which is saved at the start and
written in the background, and 100 steps without. The order alternates between
rounds.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import contextlib
import gc
import pathlib
import statistics
import tempfile
import time

import jax

from attention.training import command_line, main, tasks
from attention.training.calls import Calls
from attention.training.optimization import optimizers
from attention.training.optimization.step import Step
from attention.training.parallelism import sharding
from attention.training.training_config import TrainingConfig
from attention.training.workdir.checkpoints import Checkpoints

_STEPS = 100
_CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'gpt_char.py'


def measure(rounds: int) -> None:
  """Print the median milliseconds per step, and the median ratio."""
  gc.set_threshold(100_000)  # as train.py
  config = command_line.load_config(str(_CONFIG))
  main.set_up_jax(config.training.cpu_devices)
  settings = TrainingConfig.create(config.training.to_dict())
  optimizer, schedule = optimizers.adamw(
    steps=settings.steps, **config.optimizer
  )
  task = tasks.create(config)
  mesh = sharding.make_mesh(task.batch_size)
  step = Step(task, optimizer, schedule, config.seed, mesh, settings)
  state, n, calls = step.init(), 0, Calls(task, settings)
  seconds = {True: [], False: []}

  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(pathlib.Path(folder), settings.num_kept)
    with contextlib.closing(checkpoints):
      for round in range(rounds + 1):
        for is_saved in sorted(seconds, reverse=bool(round % 2)):
          clock, start = time.perf_counter(), n
          if is_saved:
            checkpoints.save(n, state)
          while n % _STEPS or n == start:
            batches = calls.batches(n)
            stacked = step.stack(batches)
            program = step.compile(stacked).result()
            state, _ = step.run(program, state, stacked, n, len(batches))
            n += len(batches)
          jax.block_until_ready(state)
          if round:  # the first one compiles
            seconds[is_saved].append((time.perf_counter() - clock) / _STEPS)
          checkpoints.wait()

  ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
  print(
    f'with    {1e3 * statistics.median(seconds[True]):.2f} ms per step\n'
    f'without {1e3 * statistics.median(seconds[False]):.2f} ms per step\n'
    f'ratio   {statistics.median(ratios):.3f} ({min(ratios):.3f} to '
    f'{max(ratios):.3f}, {rounds} rounds)'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=10)
  measure(parser.parse_args().rounds)
