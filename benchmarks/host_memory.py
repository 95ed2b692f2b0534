"""Measure what training.keep_memory saves, on the CPU.

  python benchmarks/host_memory.py [--rounds=5] [--batch_size=64]

Trains gpt_char with a larger batch, in processes that take turns: with malloc's
own settings, and with freed memory kept, see attention/training/host_memory.py.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import time

import jax
from rich.console import Console
from rich.table import Table

from attention.training import command_line, host_memory, tasks
from attention.training.optimization.step import Step
from attention.training.training_config import TrainingConfig

_CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'gpt_char.py'
_STEPS = 20
_NAMES = {'returned': "malloc's settings", 'kept': 'memory kept'}


def train(name: str, batch_size: int) -> dict:
  """Return what a step takes, in this process."""
  if name == 'kept':
    host_memory.keep_freed_memory()
  config = command_line.load_config(str(_CONFIG))
  config.data.batch_size = batch_size
  jax.config.update('jax_num_cpu_devices', config.training.cpu_devices)
  config.training.steps_per_call = 1
  settings = TrainingConfig.create(config.training.to_dict())
  task = tasks.create(config)
  step = Step.create(config, settings, task)
  state, batches = step.init(), step.stack([task.batch(0)])
  program = step.compile(batches).result()
  for n in range(2 * _STEPS):
    if n == _STEPS:  # the first half warms up
      jax.block_until_ready(state)
      before, clock = resource.getrusage(resource.RUSAGE_SELF), time.time()
    state, _ = step.run(program, state, batches, n)
  jax.block_until_ready(state)
  seconds = time.time() - clock
  after = resource.getrusage(resource.RUSAGE_SELF)
  return {
    'ms': 1e3 * seconds / _STEPS,
    'faults': (after.ru_minflt - before.ru_minflt) / _STEPS,
    'mib': program.memory_analysis().temp_size_in_bytes / 2**20,
  }


def measure(rounds: int, batch_size: int) -> None:
  """Print the medians of both settings, and the median ratio."""
  found = {name: [] for name in _NAMES}
  for _ in range(rounds):
    for name in _NAMES:
      command = [sys.executable, __file__, f'--batch_size={batch_size}']
      printed = subprocess.check_output([*command, f'--child={name}'])
      found[name].append(json.loads(printed))
  table = Table('', 'ms per step', 'page faults per step')
  for name, title in _NAMES.items():
    ms, faults = (
      statistics.median(x[key] for x in found[name]) for key in ('ms', 'faults')
    )
    table.add_row(title, f'{ms:.0f}', f'{faults:,.0f}')
  ratio = statistics.median(
    a['ms'] / b['ms'] for a, b in zip(*found.values(), strict=True)
  )
  table.caption = (
    f'ratio {ratio:.2f}; {found["kept"][0]["mib"]:.0f} MiB of temporaries on '
    f'each device; {rounds} rounds, jax {jax.__version__}'
  )
  Console().print(table)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--child', choices=_NAMES, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    print(json.dumps(train(arguments.child, arguments.batch_size)))
  else:
    measure(arguments.rounds, arguments.batch_size)
