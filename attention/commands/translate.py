"""Translate lines from standard input with a run's model."""

import sys

from attention.commands import trained_models
from attention.training import translate_lines


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  parser.add_argument('--workdir', required=True, help='folder of the run')
  trained_models.add_beam_size(parser)


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  task, params = trained_models.open_task(arguments, 'translation')
  num_refused = translate_lines.answer_lines(
    task,
    params,
    sys.stdin.buffer,
    sys.stdout,
    sys.stderr,
    beam_size=arguments.beam_size,
  )
  return 1 if num_refused else 0
