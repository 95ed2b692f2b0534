"""The loss of every variant of the Transformer at an equal budget.

  python benchmarks/variants.py --data=input.txt

Trains a small GPT (2 layers × 4 heads × width 64, 1,000 steps of 12 × 64
characters) for each variant and three seeds, and evaluates it on the whole
validation part. Each variant changes one thing in the first row; the flags of
train.py that select it are in the last column. Parameters differ between some
variants, so their numbers are in the table.
"""

# ruff: noqa: E402
import sys

# This folder holds attention.py, which would hide the package.
del sys.path[0]

import argparse
import pathlib
import statistics
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from attention.training import command_line, tasks
from attention.training.optimization import optimizers
from attention.training.optimization.step import Step, init
from attention.training.training_config import TrainingConfig

_CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'gpt_char.py'
_VARIANTS = {
  'baseline': {},
  'dot product, unscaled': {'attention.similarity': 'dot'},
  'cosine similarity': {'attention.similarity': 'cosine'},
  'general similarity': {'attention.similarity': 'general'},
  'additive similarity': {'attention.similarity': 'additive'},
  'sinusoidal positions': {'positions': 'sinusoidal'},
  'rotary positions': {'positions': 'rotary'},
  'ALiBi': {'positions': 'alibi'},
  "T5's buckets": {'positions': 't5'},
  'no positions': {'positions': 'none'},
  'post-norm': {'norm': 'post'},
  'RMS norm': {'norm_kind': 'rms'},
  'ReLU': {'activation': 'relu'},
  'SiLU': {'activation': 'silu'},
  'GEGLU': {'activation': 'geglu'},
  'SwiGLU': {'activation': 'swiglu'},
  '2 key/value heads': {'attention.num_kv_heads': 2},
  '1 key/value head': {'attention.num_kv_heads': 1},
  'window of 16': {'window': 16},
  'QK-norm': {'attention.with_qk_norm': True},
  'sinks': {'attention.with_sinks': True},
  'logit cap of 10': {'attention.logit_cap': 10.0},
  'full-width values': {'attention.value_factorisation': 'full'},
  'LSTM as mixer': {'mixer': 'lstm'},
  'convolution as mixer': {'mixer': 'conv'},
}


def _config(arguments, changes):
  config = command_line.load_config(str(_CONFIG))
  config.data.path = arguments.data
  config.training.steps = arguments.steps
  config.model.update({'num_layers': 2, 'model_size': 64})
  config.update_from_flattened_dict(
    {f'model.{key}': value for key, value in changes.items()}
  )
  return config


def train(config, seeds: int):
  """Trains a config from several seeds.

  Returns:
    (number of parameters, validation losses in nats, milliseconds per step).
  """
  settings = TrainingConfig.create(config.training.to_dict())
  task = tasks.create(config)
  step = Step.create(config, settings, task)
  program = step.compile(step.stack([task.batch(0)])).result()
  optimizer, _ = optimizers.adamw(steps=settings.steps, **config.optimizer)
  begin = jax.jit(
    lambda seed: init(task, optimizer, seed),
    out_shardings=jax.tree.map(lambda x: x.sharding, step.like),
  )
  losses, seconds = [], []
  for seed in range(seeds):
    state = begin(np.int32(seed))
    start = time.perf_counter()
    n = 0
    while n < settings.steps:
      count = min(settings.steps_per_call, settings.steps - n)
      first = seed * settings.steps + n
      batches = step.stack([task.batch(first + i) for i in range(count)])
      state, _ = step.run(program, state, batches, n, count)
      n += count
    jax.block_until_ready(state)
    seconds.append((time.perf_counter() - start) / settings.steps)
    values = task.evaluate(state['params'], step.place)
    losses.append(values['eval/loss'])
  count = sum(x.size for x in jax.tree.leaves(step.like['params']))
  return count, losses, statistics.median(seconds) * 1e3


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--data', default='', help='a UTF-8 text; see gpt_char')
  parser.add_argument('--steps', type=int, default=1_000)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--only', nargs='*', help='names of variants')
  parser.add_argument('--markdown', action='store_true')
  arguments = parser.parse_args()
  unknown = {*(arguments.only or ())} - {*_VARIANTS}
  if unknown:
    parser.error(f'--only: expected {[*_VARIANTS]}, got {sorted(unknown)}')
  jax.config.update('jax_num_cpu_devices', 2)

  header = ('variant', 'parameters', 'loss', 'seeds', 'ms/step', 'flags')
  rows = []
  console = Console(stderr=True)
  for name in arguments.only or _VARIANTS:
    changes = _VARIANTS[name]
    count, losses, step = train(_config(arguments, changes), arguments.seeds)
    flags = ' '.join(f'--config.model.{k}={v}' for k, v in changes.items())
    spread = f'{min(losses):.3f} – {max(losses):.3f}'
    mean = f'{statistics.mean(losses):.3f}'
    rows.append((name, f'{count:,}', mean, spread, f'{step:.1f}', flags))
    console.print(*rows[-1][:5], sep='  ', highlight=False)
  caption = f'nats per token, jax {jax.__version__}, {jax.default_backend()}'
  if arguments.markdown:
    for row in (header, ('---',) * len(header), *rows):
      print(f'| {" | ".join(row)} |')
    print(f'\n{caption}')
    return
  table = Table(*header, caption=caption)
  for row in rows:
    table.add_row(*row)
  Console().print(table)


if __name__ == '__main__':
  main()
