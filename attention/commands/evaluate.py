"""Evaluate a model on its run's held-out data, or on given files."""

import pathlib
import sys

import jax

from attention.commands import trained_models
from attention.data import translation
from attention.data.files import read_text
from attention.training import tasks, trained
from attention.training.main import set_up_jax
from attention.training.workdir import run_files


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  trained_models.add_flags(parser)
  parser.add_argument(
    '--text', help='text file for a language model to predict'
  )
  parser.add_argument(
    '--context_size',
    type=int,
    default=0,
    help="tokens of context with --text (default: the model's, up to 1,024)",
  )
  parser.add_argument('--source', help='file of source lines, plain or gzip')
  parser.add_argument(
    '--target', help='file of their translations, line by line'
  )
  trained_models.add_beam_size(parser)
  trained_models.add_weights(parser)


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  files = arguments.source, arguments.target
  if arguments.text is not None:
    text = read_text(arguments.text)
    task, params = trained_models.open_task(arguments, 'language')
    found = task.evaluate_text(params, text, arguments.context_size)
    print(f'{found["loss"]:.4f} nats per token of {found["tokens"]:,.0f}')
    print(f'{found["bits_per_byte"]:.4f} bits per byte of {found["bytes"]:,}')
    return 0
  if arguments.model:
    raise ValueError('--model: requires --text=FILE to evaluate it on')
  if files == (None, None):
    set_up_jax()
    workdir = pathlib.Path(arguments.workdir)
    config = run_files.load_config(workdir)
    task = tasks.create(config, run_files.load_data(workdir))
    params = trained.params(arguments.workdir, task)
    params = trained_models.with_weights(arguments, params)
    if config.task != 'translation':
      for name, value in task.evaluate(params, jax.device_put).items():
        print(f'{name} {value:.4f}')
      return 0
    parts = {k: v for k, v in task.data.pairs.items() if k != 'train'}
  else:
    if None in files:
      raise ValueError('--source and --target: expected both, or neither')
    parts = {arguments.source: translation.read_pairs(*files)}
    task, params = trained_models.open_task(arguments, 'translation')
  for name, (sources, targets) in parts.items():
    for number, reason in task.refusals(sources).items():
      print(f'{name}: line {number + 1}: {reason}', file=sys.stderr)
    print(f'{name}: {len(sources):,} pairs')
    for line in task.report(params, sources, targets, arguments.beam_size):
      print(f'  {line}', flush=True)
  return 0
