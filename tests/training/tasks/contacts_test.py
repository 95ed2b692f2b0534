"""Runs of the task `contacts`, and its command."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from attention.__main__ import main
from attention.data import contacts
from attention.training import command_line, loop, tasks, trained

_ROOT = pathlib.Path(__file__).parents[3]


def _config(size='debug', **changes):
  config = command_line.load_config(f'{_ROOT}/configs/contacts.py:{size}')
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('contacts') / 'run'
  loop.train(_config(), workdir)
  return workdir


def test_a_run_learns_and_draws_its_map(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  assert '"eval/all_L1"' in lines[-1]
  task, params = trained.load(run, 'contacts')
  losses = [json.loads(x)['eval/loss'] for x in lines if 'eval/loss' in x]
  assert losses[-1] < losses[0] < 3.0
  assert (run / 'plots' / 'contacts.png').stat().st_size > 10_000
  scores = task.scores(params)
  assert scores.shape == (40, 40) and np.isfinite(scores).all()


def test_the_command_compares_to_the_baseline_and_writes_pairs(run, capsys):
  out = run / 'pairs.csv'
  assert main(['contacts', f'--workdir={run}', f'--out={out}']) == 0
  *lines, csv, png = capsys.readouterr().out.splitlines()
  task = tasks.create(_config())
  alignment = task.alignment
  baseline = contacts.mean_field_dca(alignment.residues, alignment.weights)
  expected = contacts.precisions(baseline, alignment.contacts)
  assert [line.split(' (')[0].rsplit(' ', 1)[0] for line in lines] == [
    *expected
  ]
  for line, value in zip(lines, expected.values(), strict=True):
    assert line.endswith(f'(mean-field DCA {value:.2f})')
  assert csv == str(out) and pathlib.Path(png).exists()
  assert len(out.read_text().splitlines()) == 1 + 34 * 35 // 2


@pytest.mark.parametrize('kind', ['factored_attention', 'potts'])
def test_the_penalty_is_of_the_whole_alignment(kind):
  key = jax.random.key(0)

  def loss(decay, batch_size):
    task = tasks.create(
      _config(
        **{
          'model.kind': kind,
          'model.decay': decay,
          'data.batch_size': batch_size,
        }
      )
    )
    batch = {'residues': task.alignment.residues[:8].astype(np.int32)}
    params = jax.tree.map(lambda x: x + 0.1, task.init(key))
    nats, _ = jax.jit(task.loss)(params, None, batch)
    couplings = np.asarray(jax.jit(task._couplings.apply)(params))
    return float(nats), np.square(couplings).sum(), task.alignment

  plain, size, alignment = loss(0.0, 8)
  penalised, *_ = loss(3.0, 8)
  expected = 3.0 / 2 * size * 8 / alignment.effective_number
  assert penalised - plain == pytest.approx(expected, rel=1e-3)


def test_gaps_are_neither_predicted_nor_counted():
  task = tasks.create(_config())
  params = jax.tree.map(lambda x: x + 0.1, task.init(jax.random.key(0)))
  residues = task.alignment.residues[:1].astype(np.int32)
  residues[0, 3:5] = 21
  nats, count = jax.jit(task.loss)(params, None, {'residues': residues})
  unknown = np.where(residues == 21, 20, residues)
  same, _ = jax.jit(task.loss)(params, None, {'residues': unknown})
  assert count == 38 and float(nats) == float(same)


def test_a_stopped_run_resumes_to_the_same_parameters(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
  loop.train(_config(), tmp_path / 'run')
  _, expected = trained.load(run)
  _, params = trained.load(tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_mistakes_are_reported_before_training(tmp_path, run, capsys):
  with pytest.raises(ValueError, match='model.decay: expected 0 or more'):
    tasks.create(_config(**{'model.decay': -1.0}))
  with pytest.raises(FileNotFoundError):
    tasks.create(_config(**{'data.path': str(tmp_path / 'x.a3m')}))
  words = ['contacts', f'--workdir={run}', f'--structure={tmp_path}/x.pdb']
  assert main(words) == 2
  assert capsys.readouterr().err == (
    f'error: {tmp_path}/x.pdb: No such file or directory\n'
  )


@pytest.mark.slow
@pytest.mark.parametrize('size', ['', 'potts'])
def test_a_real_family_gives_better_contacts_than_the_baseline(
  size, tmp_path, capsys, real_files
):
  path = f'{real_files}/msa/4zey_A.a3m'
  config = _config(size, **{'data.path': path})
  loop.train(config, tmp_path / 'run')
  capsys.readouterr()
  words = f'--structure={real_files}/msa/4zey.cif', '--chain=A'
  assert main(['contacts', f'--workdir={tmp_path}/run', *words]) == 0
  first = capsys.readouterr().out.splitlines()[0].split()
  assert first[:2] == ['all', 'L/1']
  assert float(first[2]) > float(first[-1].rstrip(')'))
