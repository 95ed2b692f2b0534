"""Runs of the task `msa`, and the commands that use them."""

import json
import pathlib
import shutil

import haiku as hk
import jax
import numpy as np
import pytest

from attention.__main__ import main
from attention.data import alignments, contacts, masking
from attention.training import command_line, loop, tasks, trained

_ROOT = pathlib.Path(__file__).parents[3]
_ITERATION = 'alphafold/alphafold_iteration'
_TRUNK = f'{_ITERATION}/evoformer'


def _config(**changes):
  config = command_line.load_config(f'{_ROOT}/configs/msa.py:debug')
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('msa') / 'run'
  loop.train(_config(), workdir)
  return workdir


def _lines(run):
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_run_learns_and_measures_its_baselines(run):
  evaluations = [x for x in _lines(run) if 'eval/loss' in x]
  assert evaluations[-1]['eval/loss'] < evaluations[0]['eval/loss']
  for line in evaluations:
    # The weights of both losses are 1.
    assert line['eval/loss'] == pytest.approx(
      line['eval/msa_loss'] + line['eval/distogram_loss']
    )
  task = tasks.create(_config())
  found, hits, count = [], 0, 0
  for batch, (family,) in task.data.held_out_batches(1):
    # Six sequences fit into the four rows and two extra rows of a sample.
    rows = np.concatenate([batch['targets'][0], batch['extra_msa'][0]])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, family.residues))
    sample = {name: x[0] for name, x in batch.items()}
    guesses = masking.column_profile(sample)
    is_masked = sample['is_masked']
    hits += (guesses == sample['targets'])[is_masked].sum()
    count += is_masked.sum()
    rows = sample['targets']
    scores = contacts.mean_field_dca(rows, alignments.sequence_weights(rows))
    found.append(contacts.precisions(scores, family.contacts)['all L/2'])
  last = evaluations[-1]
  assert last['eval/dca_all_L2'] == pytest.approx(np.mean(found))
  assert last['eval/profile_accuracy'] == pytest.approx(hits / count)


def test_the_loss_is_of_masked_residues_and_known_distances():
  task = tasks.create(_config())
  batch = task.batch(0)
  rng = jax.random.key(0)
  params = jax.tree.map(lambda x: x + 0.1, task.init(rng))
  loss = jax.jit(task.loss)
  expected, count = loss(params, rng, batch)
  assert count == 2
  targets = np.where(batch['is_masked'], batch['targets'], 3)
  same, _ = loss(params, rng, batch | {'targets': targets})
  assert float(same) == float(expected)
  one = batch | {'distances': np.full_like(batch['distances'], np.nan)}
  without, _ = loss(params, rng, one)
  neither, _ = loss(
    params, rng, one | {'is_masked': np.zeros_like(batch['is_masked'])}
  )
  assert 0 < float(without) < float(expected) and float(neither) == 0


def test_a_stopped_run_resumes_to_the_same_parameters(run, tmp_path):
  shutil.copytree(run, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '10')
  loop.train(_config(), tmp_path / 'run')
  _, expected = trained.load(run)
  _, params = trained.load(tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_contacts_are_ranked_in_a_held_out_family_or_a_file(
  run, tmp_path, capsys
):
  assert main(['contacts', f'--workdir={run}']) == 0
  *lines, pairs, png = capsys.readouterr().out.splitlines()
  assert [x.split(' (')[0].rsplit(' ', 1)[0] for x in lines][:2] == [
    'all L/1',
    'all L/2',
  ]
  assert pairs == str(run / 'contacts.rr') and pathlib.Path(png).exists()

  path = tmp_path / 'x.a3m'
  query = 'MKVLAEDCRNSTWYGHIPFQ' * 2
  path.write_text(f'>q\n{query}\n' + f'>o\n{query[::-1]}\n' * 20)
  out = tmp_path / 'pairs.csv'
  words = [f'--alignment={path}', f'--out={out}']
  assert main(['contacts', f'--workdir={run}', *words]) == 0
  assert capsys.readouterr().out.splitlines()[0] == str(out)
  first, *rest = out.read_text().splitlines()[1:]
  assert len(rest) + 1 == 34 * 35 // 2
  task, params = trained.load(run, 'msa')
  scores = task.scores(params, alignments.read(str(path)))
  i, j, score = first.split(',')
  assert float(score) == pytest.approx(scores[int(i) - 1, int(j) - 1], rel=1e-4)
  assert float(score) == pytest.approx(np.triu(scores, 6).max(), rel=1e-4)


def test_plot_draws_rows_columns_and_triangles(run, tmp_path, capsys):
  path = tmp_path / 'x.a3m'
  path.write_text('>q\nMKVLAEDC\n>o\nMKVLAEDA\n' * 3)
  out = tmp_path / 'plots'
  words = [f'--workdir={run}', f'--text={path}', f'--out={out}']
  assert main(['plot', *words]) == 0
  names = {pathlib.Path(x).name for x in capsys.readouterr().out.splitlines()}
  for kind in ('row', 'column', 'triangle'):
    for end in ('_grid.png', '_pattern.png', '_flow.png', '.html'):
      assert f'{kind}{end}' in names
  task, params = trained.load(run)
  queries, keys, found = task.patterns(params, str(path))['row']
  assert queries == keys == [f'{a}{i}' for i, a in enumerate('MKVLAEDC', 1)]
  for name, pattern in found.items():
    assert pattern.shape[-3:] == (4, 8, 8), name
    np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)


@pytest.fixture(scope='module')
def published():
  """The arrays of a parameter file of an AlphaFold of the debug size."""
  task = tasks.create(_config())
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  flat = {}
  for scope, name, leaf in hk.data_structures.traverse(shapes):
    rest = scope.removeprefix('msa').removeprefix('/')
    is_head = rest.startswith(('masked_msa_head', 'distogram_head'))
    source = f'{_ITERATION if is_head else _TRUNK}/{rest}//{name}'
    if name == 'first_row':
      source = f'{_TRUNK}/prev_msa_first_row_norm//offset'
    flat[source] = rng.normal(size=leaf.shape).astype('f')
  for name, leaf in (('prev_pos_linear', 'bias'), ('prev_pair_norm', 'offset')):
    flat[f'{_TRUNK}/{name}//{leaf}'] = rng.normal(size=8).astype('f')
  flat[f'{_ITERATION}/predicted_lddt_head/logits//bias'] = np.ones(3, 'f')
  return flat


def test_a_run_starts_from_alphafolds_parameters(published, tmp_path):
  path = tmp_path / 'params_model_1.npz'
  np.savez(path, **published)
  # So small a rate leaves the parameters as they were.
  changes = {'model.params': str(path), 'optimizer.learning_rate': 1e-12}
  config = _config(**changes, **{'training.steps': 1})
  loop.train(config, tmp_path / 'run')
  path.unlink()
  # Neither a resumed run nor its use needs the file again.
  loop.train(_config(**changes, **{'training.steps': 2}), tmp_path / 'run')
  _, params = trained.load(tmp_path / 'run')
  for scope, name in (
    ('preprocess_msa', 'weights'),
    ('evoformer_iteration/msa_transition/transition1', 'weights'),
    ('extra_msa_stack/outer_product_mean', 'output_w'),
  ):
    np.testing.assert_array_equal(
      params[f'msa/{scope}'][name], published[f'{_TRUNK}/{scope}//{name}']
    )
  np.testing.assert_array_equal(
    params['msa/masked_msa_head/logits']['bias'],
    published[f'{_ITERATION}/masked_msa_head/logits//bias'],
  )
  np.testing.assert_array_equal(
    params['msa']['first_row'],
    published[f'{_TRUNK}/prev_msa_first_row_norm//offset'],
  )
  np.testing.assert_allclose(
    params['msa/pair_activiations']['bias'],
    published[f'{_TRUNK}/pair_activiations//bias']
    + published[f'{_TRUNK}/prev_pos_linear//bias']
    + published[f'{_TRUNK}/prev_pair_norm//offset'],
    rtol=1e-6,
  )


def test_other_parameters_are_refused_by_name(published, tmp_path):
  path = tmp_path / 'params.npz'
  wrong = dict(published)
  del wrong[f'{_TRUNK}/left_single//bias']
  wrong[f'{_ITERATION}/distogram_head/half_logits//bias'] = np.ones(5, 'f')
  np.savez(path, **wrong)
  with pytest.raises(ValueError) as error:
    tasks.create(_config(**{'model.params': str(path)}))
  assert 'evoformer/left_single//bias: expected (8,), got none' in str(
    error.value
  )
  assert 'half_logits//bias: expected (64,), got (5,)' in str(error.value)
  with pytest.raises(FileNotFoundError):
    tasks.create(_config(**{'model.params': str(tmp_path / 'none.npz')}))


def test_mistakes_are_reported_before_training(run, tmp_path, capsys):
  for changes, message in (
    ({'model.msa_weight': -1.0}, 'model.msa_weight: expected 0 or more'),
    ({'data.num_seq': 0}, 'data.num_seq: expected 1 or more, got 0'),
    ({'data.path': str(tmp_path)}, 'expected 2 or more alignments'),
  ):
    with pytest.raises(ValueError, match=message):
      tasks.create(_config(**changes))
  words = ['contacts', f'--workdir={run}', f'--alignment={tmp_path}/x.a3m']
  assert main(words) == 2
  assert capsys.readouterr().err == (
    f'error: {tmp_path}/x.a3m: No such file or directory\n'
  )
