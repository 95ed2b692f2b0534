"""Fixtures: runs of size :debug on a small text, here or in a subprocess."""

import os
import pathlib
import subprocess
import sys

import orbax.checkpoint as ocp
import pytest

from attention.training import command_line, loop
from attention.training import main as training_main
from attention.training.workdir.checkpoints import Checkpoints

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text('the quick brown fox jumps over the lazy dog.\n' * 60)
  return path


@pytest.fixture(scope='session')
def config(text):
  """config(size='debug', **{'training.steps': 7}): gpt_char on `text`.

  Without TensorBoard, whose imports may take seconds.
  """

  def make(name='gpt_char', size='debug', **changes):
    path = _ROOT / 'configs' / f'{name}.py'
    config = command_line.load_config(f'{path}:{size}')
    config.data.path = str(text)
    config.training.tensorboard = False
    config.update_from_flattened_dict(changes)
    return config

  return make


@pytest.fixture(scope='session')
def ended(config, tmp_path_factory):
  """The workdir of a finished run of 3 steps. Shared: copy it to change it."""
  workdir = tmp_path_factory.mktemp('ended') / 'run'
  loop.train(config(**{'training.steps': 3}), workdir)
  return workdir


@pytest.fixture(scope='session')
def newest_state():
  """newest_state(workdir): (step, state) of the newest checkpoint."""

  def read(workdir):
    checkpoints = Checkpoints(workdir / 'checkpoints')
    step = checkpoints.latest_step()
    checkpoints.close()
    folder, orbax = (
      workdir / 'checkpoints' / str(step),
      ocp.PyTreeCheckpointer(),
    )
    parts = [p for p in folder.iterdir() if (p / '_METADATA').is_file()]
    return step, {part.name: orbax.restore(part) for part in parts}

  return read


@pytest.fixture
def train_here(monkeypatch):
  """train_here(*words): the exit status of `train.py *words`, run here."""

  def main(*words):
    with monkeypatch.context() as patch:
      # It changes the settings of JAX that tests share.
      patch.setattr(training_main, 'set_up_jax', lambda *_: None)
      return training_main.main(['train.py', *map(str, words)])

  return main


@pytest.fixture
def python():
  """python(*words): starts `python *words` in the repository root."""
  processes = []

  def start(*words):
    process = subprocess.Popen(
      [sys.executable, *map(str, words)],
      cwd=_ROOT,
      env={**os.environ, 'PYTHONUNBUFFERED': '1'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()
