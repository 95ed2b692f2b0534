"""Several processes train one run together and stop together."""

import os
import signal
import socket
import time

import numpy as np
import pytest

from attention.training.parallelism import processes
from attention.training.workdir import metrics


@pytest.fixture
def start(text, tmp_path, python):
  """start(name, num_processes, steps): starts the processes of one run."""

  def start(name, num_processes, steps, config='gpt_char', *words):
    words = [
      'train.py',
      *words,
      f'--config=configs/{config}.py:debug',
      f'--config.data.path={text}',
      f'--workdir={tmp_path / name}',
      f'--config.training.steps={steps}',
      '--config.training.log_every=1',
      f'--config.training.cpu_devices={2 // num_processes}',
    ]
    if num_processes == 1:
      return [python(*words)]
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    return [
      python(
        *words,
        f'--coordinator=localhost:{port}',
        f'--num_processes={num_processes}',
        f'--process_id={n}',
      )
      for n in range(num_processes)
    ]

  return start


def _losses(workdir):
  lines = metrics.read(workdir / 'metrics.jsonl')
  return {
    (line['step'], kind): line[kind]
    for line in lines
    for kind in ('train/loss', 'eval/loss')
    if kind in line
  }


@pytest.mark.slow
def test_two_processes_match_one_process_with_two_devices(start, tmp_path):
  for name, num_processes in (('one', 1), ('two', 2)):
    for process in start(name, num_processes, 30):
      _, error = process.communicate(timeout=300)
      assert process.returncode == 0, error
  one, two = _losses(tmp_path / 'one'), _losses(tmp_path / 'two')
  assert one.keys() == two.keys()
  assert len(one) == 32
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-6)
  # Both processes read the run that they fine-tune.
  tuned = {}
  for name, num_processes in (('tuned', 1), ('tuned_by_two', 2)):
    word = f'--config.init.path={tmp_path / "one"}'
    for process in start(name, num_processes, 4, 'finetune', word):
      _, error = process.communicate(timeout=300)
      assert process.returncode == 0, error
    tuned[name] = list(_losses(tmp_path / name).values())
  assert tuned['tuned'][0] == pytest.approx(one[30, 'eval/loss'], rel=2e-6)
  np.testing.assert_allclose(*tuned.values(), rtol=2e-6)
  # One process resumes from the checkpoint of two.
  for process in start('two', 1, 35):
    output, error = process.communicate(timeout=300)
    assert 'resumed from step 30' in output, error


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
@pytest.mark.parametrize('axis', ['data', 'context'])
def test_a_killed_process_ends_the_other_with_an_error(
  start, tmp_path, killed, axis
):
  words = [
    f'--config.training.mesh.data={2 if axis == "data" else 1}',
    f'--config.training.mesh.context={2 if axis == "context" else 1}',
  ]
  processes = start('run', 2, 100_000, 'gpt_char', *words)
  while not _losses(tmp_path / 'run'):
    assert all(p.poll() is None for p in processes)
    time.sleep(0.1)
  began = time.monotonic()
  processes[killed].send_signal(signal.SIGKILL)
  _, error = processes[1 - killed].communicate(timeout=90)
  seconds = time.monotonic() - began
  print(f'ended after {seconds:.1f} s')
  assert seconds < 60
  status = processes[1 - killed].returncode
  if killed == 0 and status == -signal.SIGABRT:  # JAX lost its service first
    assert 'another task died' in error
  else:
    assert status == 1
    assert 'error: another process of this run has ended' in error


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(start, tmp_path):
  processes = start('run', 2, 100_000)
  while not _losses(tmp_path / 'run'):
    assert all(p.poll() is None for p in processes)
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGTERM)
  output, error = processes[0].communicate(timeout=120)
  assert processes[0].returncode == 0, error
  assert 'stopped by SIGTERM at step' in output
  assert processes[1].wait(timeout=60) == 0
  names = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert str(max(step for step, _ in _losses(tmp_path / 'run'))) in names


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('host:1', 0, -1), 'expected all three or none'),
    (('', 2, 0), 'expected all three or none'),
    (('host:1', 2, 2), '--process_id: expected less than --num_processes=2'),
  ],
)
def test_incomplete_process_flags_raise(given, message):
  with pytest.raises(ValueError, match=message):
    processes.start(*given)


def test_only_a_cluster_starts_jax_distributed(monkeypatch):
  started = []
  monkeypatch.setattr(
    processes.jax.distributed, 'initialize', lambda **_: started.append(1)
  )
  for name in ('SLURM_STEP_NUM_TASKS', 'JOB_COMPLETION_INDEX'):
    monkeypatch.delenv(name, raising=False)
  processes.start('', 0, -1)
  assert not started
  monkeypatch.setitem(os.environ, 'SLURM_STEP_NUM_TASKS', '4')
  processes.start('', 0, -1)
  assert started
