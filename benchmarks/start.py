"""Time train.py from the start of its process to the end of its first step.

  python benchmarks/start.py [--rounds=5] [-- --config.training.cpu_devices=1]

Each round starts the run twice in a new folder: cold, with an empty compilation
cache, and warm, with the programs of the cold run. What follows `--` is passed
to train.py.
"""

import argparse
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

_ROOT = pathlib.Path(__file__).parents[1]


def first_step(flags: list[str], folder: pathlib.Path, cache: str) -> float:
  """Run train.py until it logs its first step; returns the seconds."""
  command = [sys.executable, '-u', str(_ROOT / 'train.py')]
  command += [f'--workdir={folder}', *flags]
  environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': cache}
  start = time.perf_counter()
  with subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if line.startswith('step 1/'):
        seconds = time.perf_counter() - start
        process.send_signal(signal.SIGKILL)
        return seconds
  raise SystemExit('train.py ended before its first step')


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--config', default=str(_ROOT / 'configs/gpt_char.py'))
  parser.add_argument('flags', nargs='*', help='passed to train.py')
  arguments = parser.parse_args()
  flags = [f'--config={arguments.config}', *arguments.flags]
  times = {'cold': [], 'warm': []}
  with tempfile.TemporaryDirectory() as folder:
    for n in range(arguments.rounds):
      cache = f'{folder}/cache{n}'
      for name, seconds in times.items():
        workdir = pathlib.Path(folder, f'{name}{n}')
        seconds.append(first_step(flags, workdir, cache))
  for name, seconds in times.items():
    print(
      f'{name}  {statistics.median(seconds):.1f} s ({min(seconds):.1f} to '
      f'{max(seconds):.1f}, {len(seconds)} rounds)'
    )


if __name__ == '__main__':
  main()
