"""Loading trained models from their runs."""

import pathlib

import jax

from attention.training import tasks
from attention.training.workdir import run_files
from attention.training.workdir.checkpoints import newest_params


def load(workdir, kind: str | None = None) -> tuple:
  """Load a run's task, without its data, and the newest parameters.

  Args:
    workdir: folder of the run.
    kind: the required task ('language', …); None accepts any.

  Returns:
    (task, params), such as a `Language` and {module: {name: array}}.

  Raises:
    ValueError: the workdir has no run, a run of another task, or no checkpoint
      yet.
  """
  workdir = pathlib.Path(workdir)
  config = run_files.load_config(workdir)
  if kind not in (None, config.task):
    raise ValueError(
      f'{workdir}: expected a run of task {kind!r}, got one of {config.task!r}'
    )
  task = tasks.load(config, workdir)
  return task, params(workdir, task)


def params(workdir, task) -> dict:
  """Load the newest parameters of a run whose task is already loaded.

  Raises:
    ValueError: the run has no checkpoint yet.
  """
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  return newest_params(pathlib.Path(workdir), shapes)[1]
