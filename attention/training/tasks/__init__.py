"""Tasks that a run can train.

Each task provides its batches, a loss and an evaluation. It also has three
attributes for messages: `command`, the subcommand of python -m attention that
uses its model, `loss_unit` and `example_name`. It may have `pretrained`:
parameters to start from instead of those of `init`, all or some, or None, read
when they are first needed, since a run that is resumed or used does not;
`is_trained(module, name, value)`: which parameters are trained, or None for
all; `is_per_token`: False if its matrices are not applied once per token; and
`has_pairs`: True if the mesh axis 'pairs' divides its model.
"""

import importlib
import pathlib

from attention.training.workdir import run_files

_TASKS = ('classification', 'contacts', 'language', 'msa', 'translation')


def create(config, record: dict | None = None):
  """Create a config's task, with its data.

  Args:
    config: the run's config.
    record: the data record of a run to resume, which avoids relearning what was
      learnt from the data, such as a tokenizer.

  Raises:
    ValueError: an unknown task, a seed out of range, or an invalid combination
      of data and model.
    OSError: the data cannot be read.
  """
  seed = config.seed
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise ValueError(f'seed: expected 0 to {2**32 - 1}, got {seed!r}')
  task = _find(config).create(config, record)
  if record is None:
    getattr(task, 'pretrained', None)  # raises here if it cannot be read
  return task


def load(config, workdir: pathlib.Path):
  """Load the task of a finished or interrupted run, without its data.

  Raises:
    ValueError: an unknown task, or a missing data record.
  """
  return _find(config).load(config, run_files.load_data(workdir))


def _find(config):
  """Return a config's task class, importing only its module."""
  task = config.get('task')
  if task not in _TASKS:
    raise ValueError(f'task: expected one of {list(_TASKS)}, got {task!r}')
  is_finetuned = config.task == 'language' and 'init' in config
  name = 'finetune' if is_finetuned else config.task
  module = importlib.import_module(f'{__name__}.{name}')
  return getattr(module, name.capitalize())
