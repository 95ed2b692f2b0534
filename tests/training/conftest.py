"""Fixtures: runs of size :debug on a small text, here or in a subprocess."""

import os
import pathlib
import subprocess
import sys

import pytest

from attention.training import command_line, loop

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text('the quick brown fox jumps over the lazy dog.\n' * 60)
  return path


@pytest.fixture(scope='session')
def config(text):
  """config(size='debug', **{'training.steps': 7}): gpt_char on `text`."""

  def make(name='gpt_char', size='debug', **changes):
    path = _ROOT / 'configs' / f'{name}.py'
    config = command_line.load_config(f'{path}:{size}')
    config.data.path = str(text)
    config.update_from_flattened_dict(changes)
    return config

  return make


@pytest.fixture(scope='session')
def ended(config, tmp_path_factory):
  """The workdir of a finished run of 3 steps. Shared: copy it to change it."""
  workdir = tmp_path_factory.mktemp('ended') / 'run'
  loop.train(config(**{'training.steps': 3}), workdir)
  return workdir


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
