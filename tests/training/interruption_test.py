"""Signals, kills and full disks in subprocesses: docs/guides/reliability.md."""

import json
import os
import random
import resource
import signal
import time

import numpy as np
import pytest

from attention.training.workdir import metrics


@pytest.fixture
def command(text, tmp_path):
  """command(name, *words): arguments of a run in the workdir `name`."""

  def make(name, *words, steps=400):
    return [
      '--config=configs/gpt_char.py:debug',
      f'--config.data.path={text}',
      f'--workdir={tmp_path / name}',
      f'--config.training.steps={steps}',
      '--config.training.checkpoint_every=70',
      '--config.training.eval_every=150',
      '--config.training.tensorboard=False',
      *words,
    ]

  return make


@pytest.fixture
def train(command, python):
  """train(name, *words): starts train.py at :debug in the workdir `name`."""
  return lambda *words, **more: python('train.py', *command(*words, **more))


def _finish(process):
  output, error = process.communicate(timeout=1_200)
  assert process.returncode == 0, error
  return output


@pytest.fixture
def state(newest_state):
  """state(workdir): (step, {path: bytes}) of the newest checkpoint."""
  import jax

  def read(workdir):
    step, found = newest_state(workdir)
    return step, {
      jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
      for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }

  return read


def _figures(workdir):
  """Return a run's metrics, except timings."""
  return [
    {k: v for k, v in line.items() if 'second' not in k}
    for line in metrics.read(workdir / 'metrics.jsonl')
  ]


def _wait_for(process, word):
  """Read a process's output up to a line that contains `word`."""
  for line in process.stdout:
    if word in line:
      return
  raise AssertionError(f'it ended without {word!r}: {process.communicate()}')


def _wait_until(condition, process, seconds=200):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end, 'took too long'
    time.sleep(0.005)


_MOMENTS = {
  # name: (arguments that prolong the moment, output at its start)
  'compiling': ([], 'compiling'),
  'evaluating': (['--config.training.eval_every=1'], 'step 2/'),
  'saving': (['--config.training.checkpoint_every=1'], 'step 1/'),
}


def _check_stop(train, state, tmp_path, moment):
  words, word = _MOMENTS[moment]
  stopped = train(moment, *words, steps=40)
  _wait_for(stopped, word)
  stopped.send_signal(signal.SIGTERM)
  output = _finish(stopped)
  assert 'stopped by SIGTERM at step' in output
  assert f'--workdir={tmp_path / moment}' in output.split('same command')[1]
  workdir = tmp_path / moment
  lines = _figures(workdir)
  if moment == 'compiling':
    assert not lines
  else:
    step, _ = state(workdir)
    assert lines[-1]['step'] == step < 40
  return workdir, words


@pytest.mark.parametrize('moment', ['compiling', 'evaluating'])
def test_sigterm_stops_a_run_at_any_moment(train, state, tmp_path, moment):
  _check_stop(train, state, tmp_path, moment)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_compilation_at_once(train, number):
  words = ['--config.model.num_layers=40', '--config.model.num_heads=4']
  process = train('run', *words)
  _wait_for(process, 'compiling')
  time.sleep(1)
  clock = time.monotonic()
  process.send_signal(number)
  time.sleep(0.5)
  process.send_signal(number)
  assert process.wait(timeout=60) == 128 + number
  assert time.monotonic() - clock < 5


@pytest.mark.slow
@pytest.mark.parametrize('moment', _MOMENTS)
def test_a_stopped_run_ends_like_an_uninterrupted_one(
  train, state, tmp_path, moment
):
  workdir, words = _check_stop(train, state, tmp_path, moment)
  _finish(train(moment, *words, steps=40))
  _finish(train('whole', *words, steps=40))
  assert state(workdir) == state(tmp_path / 'whole')
  assert _figures(workdir) == _figures(tmp_path / 'whole')


@pytest.mark.slow
def test_twenty_kills_change_no_byte(train, state, tmp_path):
  # Evaluations take most of the time, so evaluate only once, at the end.
  words, steps = ['--config.training.eval_every=16000'], 16_000
  _finish(train('whole', *words, steps=steps))
  chance, kills, attempts = random.Random(0), 0, 0
  workdir = tmp_path / 'killed'
  while kills < 20 and attempts < 60:
    attempts += 1
    process = train('killed', *words, steps=steps)
    _wait_for(process, 'compiling')
    time.sleep(chance.uniform(0.2, 3.0))
    is_live = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = _figures(workdir)
    if not is_live or (lines and lines[-1]['step'] >= steps):
      break
    kills += 1
  print(f'{kills} kills, the last at step {lines[-1]["step"] if lines else 0}')
  _finish(train('killed', *words, steps=steps))
  assert state(workdir) == state(tmp_path / 'whole')
  assert _figures(workdir) == _figures(tmp_path / 'whole')
  assert kills == 20


def test_training_continues_with_a_warning_on_a_full_disk(
  train, state, train_here, command, tmp_path, capsys
):
  board = '--config.training.tensorboard=True'  # it too meets the full disk
  process, workdir = train('full', board, steps=210), tmp_path / 'full'
  _wait_until(lambda: (workdir / 'checkpoints' / '70').exists(), process)
  # No file may grow beyond 100 bytes from now on, as on a full disk.
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
  output, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  assert 'step 210/210' in output
  assert 'could not be written' in output
  assert 'finished, but step 210 was not saved' in output
  assert 'Traceback' not in error
  step, _ = state(workdir)
  assert 70 <= step < 210
  assert train_here(*command('full', steps=210)) == 0
  assert f'resumed from step {step}' in capsys.readouterr().out
  assert state(workdir)[0] == 210
  evaluated = [x['step'] for x in _figures(workdir) if 'eval/loss' in x]
  assert evaluated == [150, 210]


def test_a_second_run_in_a_workdir_is_refused(
  train, train_here, command, capsys
):
  first = train('shared', steps=100_000)
  _wait_for(first, 'compiling')
  assert train_here(*command('shared', steps=100_000)) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  holder = f'process {first.pid} on {os.uname().nodename}'
  assert f'{holder} is running here' in error
  first.kill()


def test_a_workdir_has_only_the_documented_files(ended):
  assert sorted(p.name for p in ended.iterdir()) == [
    'checkpoints', 'config.json', 'data.json', 'env.json', 'lock',
    'metrics.jsonl', 'plots', 'samples',
  ]  # fmt: skip
  json.loads((ended / 'config.json').read_text())
