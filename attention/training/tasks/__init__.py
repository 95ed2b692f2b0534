"""Tasks: what a run trains. Each gives a loss, an evaluation, its batches.

And what is said of it: `command`, that of python -m attention to use its model
with, `loss_unit` and `example_name`.
"""

import pathlib

from attention.training.tasks.classification import Classification
from attention.training.tasks.language import Language
from attention.training.tasks.translation import Translation
from attention.training.workdir import run_files

_TASKS = {
  'classification': Classification,
  'language': Language,
  'translation': Translation,
}


def create(config, record: dict | None = None):
  """The task that a config asks for, with its data.

  Args:
    config: of the run.
    record: of the data of a run that goes on, so that what was learnt from it
      need not be learnt again.

  Raises:
    ValueError: an unknown task, a seed out of range, or data or a model that
      don't fit.
    OSError: data that can't be read.
  """
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed: expected 0 to {2**32 - 1}, got {config.seed}')
  return _find(config).create(config, record)


def load(config, workdir: pathlib.Path):
  """The task of a finished or interrupted run, without its data.

  Raises:
    ValueError: an unknown task, or no record of its data.
  """
  return _find(config).load(config, run_files.load_data(workdir))


def _find(config):
  if config.task not in _TASKS:
    raise ValueError(
      f'task: expected one of {sorted(_TASKS)}, got {config.task!r}'
    )
  return _TASKS[config.task]
