"""Write a run's language model in the format of transformers."""

import pathlib

from attention.commands import trained_models
from attention.training import transformers_folder


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  parser.add_argument('--workdir', required=True, help='folder of the run')
  parser.add_argument(
    '--out', required=True, help='folder for the files, new or empty'
  )


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  task, params = trained_models.open_task(arguments, 'language')
  for line in transformers_folder.save(
    pathlib.Path(arguments.out), task, params
  ):
    print(line)
  return 0
