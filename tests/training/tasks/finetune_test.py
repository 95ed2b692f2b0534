"""Fine-tuning: from a run or a folder, all parameters or low-rank updates."""

import json
import shutil

import haiku as hk
import jax
import numpy as np
import pytest

from attention import __main__ as cli
from attention.data.subwords import Subwords
from attention.modules import lora
from attention.training import (
  loop,
  tasks,
  trained,
  transformers_folder,
)
from attention.training.tasks.finetune import Start
from attention.training.tasks.language import Language
from attention.training.workdir import Unusable, metrics, run_files

_SHORT = {'training.steps': 4, 'training.log_every': 1, 'model.lora.alpha': 4.0}


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """Another text of the same characters."""
  path = tmp_path_factory.mktemp('other') / 'other.txt'
  path.write_text('a lazy dog jumps over the quick brown fox.\n' * 20)
  return path


@pytest.fixture(scope='module')
def tune(config, other):
  """tune(path, **changes): a config that fine-tunes the model of `path`."""

  def make(path, **changes):
    return config(
      'finetune',
      **{'init.path': str(path), 'data.path': str(other), **_SHORT, **changes},
    )

  return make


@pytest.fixture(scope='module')
def start(ended, tmp_path_factory):
  """A copy of a run to start from, which a test may remove."""
  workdir = tmp_path_factory.mktemp('start') / 'run'
  shutil.copytree(ended, workdir)
  return workdir


@pytest.fixture(scope='module')
def run(tune, ended, tmp_path_factory):
  """The workdir of a run of low-rank updates of rank 1."""
  workdir = tmp_path_factory.mktemp('tuned') / 'run'
  changes = {'training.checkpoint_every': 2}
  loop.train(tune(ended, **changes), workdir)
  return workdir


@pytest.fixture(scope='module')
def subwords(config, other, tmp_path_factory):
  """A folder of transformers with a tokenizer of its own."""
  folder = tmp_path_factory.mktemp('subwords') / 'folder'
  settings = config(
    **{'data.level': 'bpe', 'data.vocab_size': 270, 'data.path': str(other)}
  )
  task = tasks.create(settings)
  transformers_folder.save(folder, task, jax.jit(task.init)(jax.random.key(0)))
  return folder


def _evaluate(config, params):
  return tasks.create(config).evaluate(params, jax.device_put)['eval/loss']


def _figures(workdir):
  return [
    {k: v for k, v in line.items() if 'second' not in k}
    for line in metrics.read(workdir / 'metrics.jsonl')
  ]


def _assert_same(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def test_the_first_loss_is_that_of_the_saved_model(run, ended, config, other):
  _, params = trained.load(ended)
  expected = _evaluate(config(**{'data.path': str(other)}), params)
  lines = _figures(run)
  assert lines[0]['step'] == 0
  # On characters of this text alone, the vocabulary would be another.
  assert tasks.load(run_files.load_config(run), run).vocabulary.size == 29
  np.testing.assert_allclose(lines[0]['eval/loss'], expected, rtol=1e-6)
  assert lines[-1]['eval/loss'] < lines[0]['eval/loss']


def test_only_updates_are_trained_and_have_moments(run, ended, newest_state):
  _, base = trained.load(ended)
  _, state = newest_state(run)
  updates, frozen = hk.data_structures.partition(
    lora.is_adapter, state['params']
  )
  _assert_same(frozen, base)
  assert all(x.any() for x in jax.tree.leaves(updates))
  moments = [x.shape for x in jax.tree.leaves(state['optimizer']) if x.ndim]
  shapes = [x.shape for x in jax.tree.leaves(updates)]
  assert sorted(moments) == sorted(2 * shapes)


def test_a_run_resumes_to_the_same_bytes_without_its_start(
  run, start, tune, tmp_path, monkeypatch, capsys
):
  workdir, copy = tmp_path / 'run', tmp_path / 'start'
  shutil.copytree(start, copy)
  settings = tune(copy, **{'training.checkpoint_every': 2})
  batch = Language.batch

  class Killed(Exception):
    pass

  def killed(self, n):
    if n == 3:
      raise Killed
    return batch(self, n)

  with monkeypatch.context() as patch:
    patch.setattr(Language, 'batch', killed)
    with pytest.raises(Killed):
      loop.train(settings, workdir)
  shutil.rmtree(copy)
  capsys.readouterr()
  loop.train(settings, workdir)
  output = capsys.readouterr().out
  assert 'resumed from step 2' in output
  assert ', 512 trained (6.54%)' in output
  _assert_same(trained.load(workdir)[1], trained.load(run)[1])
  assert _figures(workdir) == _figures(run)
  with pytest.raises(ValueError, match='init.path .* → .*else'):
    loop.prepare(tune('/else', **{'training.checkpoint_every': 2}), workdir)


def test_a_run_is_used_without_its_start(run, capsys):
  capsys.readouterr()
  words = ['--num_tokens=5', '--prompt=the']
  assert cli.main(['sample', f'--workdir={run}', *words]) == 0
  assert capsys.readouterr().out.startswith('the')
  assert cli.main(['evaluate', f'--workdir={run}']) == 0
  loss = _figures(run)[-1]['eval/loss']
  assert f'eval/loss {loss:.4f}' in capsys.readouterr().out


def _damage(workdir):
  for path in (workdir / 'checkpoints').glob('*/params/_METADATA'):
    path.write_bytes(path.read_bytes()[:-1])


def test_a_run_without_intact_checkpoints_reads_its_start_again(
  ended, tune, tmp_path
):
  base, workdir = tmp_path / 'base', tmp_path / 'run'
  shutil.copytree(ended, base)
  settings = tune(base, **{'training.steps': 1})
  loop.train(settings, workdir)
  expected = _figures(workdir)
  assert [line['step'] for line in expected] == [0, 1, 1]
  # Its figures are those of the new start, not lines of before.
  figures = workdir / 'metrics.jsonl'
  figures.write_text('{"step": 0, "eval/loss": 9.0}\n')
  _damage(workdir)
  loop.train(settings, workdir)
  assert _figures(workdir) == expected
  _damage(workdir)
  shutil.rmtree(base)
  with pytest.raises(Unusable, match='cannot be read again: '):
    loop.train(settings, workdir)
  shutil.copytree(ended, base)
  (newest,) = base.glob('checkpoints/*')
  newest.rename(newest.with_name('9'))
  with pytest.raises(Unusable, match='from .* at step 3, but'):
    loop.train(settings, workdir)


def test_an_exported_run_is_merged_and_reads_back_equal(
  run, tmp_path, capsys, assert_close
):
  task, params = trained.load(run)
  words = ['export', f'--workdir={run}', f'--out={tmp_path / "out"}']
  capsys.readouterr()
  assert cli.main(words) == 0
  assert 'no tokenizer.json: transformers has no tokenizer of characters' in (
    capsys.readouterr().out
  )
  again = Start.read(str(tmp_path / 'out'))
  _assert_same(again.params, lora.merge(params, alpha=4.0))
  assert again.fields.items() <= task.model_fields.items()
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert 'error: --out: expected a new or an empty folder' in error
  assert error.count('\n') == 1


def test_a_tuned_run_is_a_start_with_its_updates_merged(run, tune):
  _, params = trained.load(run)
  again = Start.read(str(run))
  _assert_same(again.params, lora.merge(params, alpha=4.0))
  assert 'lora' not in again.fields
  task = tasks.create(tune(run, **{'model.lora.rank': 0}))
  assert task.is_trained is None
  _assert_same(task.pretrained, again.params)


def test_a_folder_gives_its_tokenizer(subwords, tune, tmp_path, capsys):
  settings = tune(subwords)
  task = tasks.create(settings)
  text = (subwords / 'tokenizer.json').read_text()
  assert task.vocabulary == Subwords(text)
  run_files.write(tmp_path / 'run', settings, task.record())
  again = tasks.load(run_files.load_config(tmp_path / 'run'), tmp_path / 'run')
  assert again.vocabulary == task.vocabulary
  assert again.model_fields == json.loads(json.dumps(task.model_fields))
  params = jax.jit(again.init)(jax.random.key(0))
  transformers_folder.save(tmp_path / 'out', again, params)
  assert (tmp_path / 'out' / 'tokenizer.json').read_text() == text
  # Its path is accepted too, and another tokenizer is not.
  path = str(tmp_path / 'out' / 'tokenizer.json')
  assert tasks.create(tune(subwords, **{'data.level': path})).pretrained
  with pytest.raises(ValueError, match="level: expected '', as .* is another"):
    tasks.create(tune(subwords, **{'data.level': 'bytes'}))


def test_fields_of_the_config_replace_those_of_the_model(ended, tune):
  changes = {'model.use_remat': True, 'model.implementation': 'chunked'}
  fields = tasks.create(tune(ended, **changes)).model_fields
  assert fields['use_remat']
  assert fields['implementation'] == 'chunked'
  assert 'implementation' not in fields['attention']
  assert fields['num_layers'] == 2
  task = tasks.create(tune(ended, **{'data.context_size': 7}))
  assert task.batch(0)['tokens'].shape == (4, 7)
  assert task.context_size == 16


@pytest.fixture(scope='module')
def strange(ended, other, tmp_path_factory):
  """A folder with a file for each mistake."""
  folder = tmp_path_factory.mktemp('strange')
  for name, content in {
    'broken': '{',
    'llama': '{"model_type": "no such model"}',
    'digits': '{"task": "classification", "data": {}, "model": {},'
    ' "training": {}}',
  }.items():
    (folder / name).mkdir()
    (folder / name / 'config.json').write_text(content)
  (folder / 'symbols.txt').write_text('ABC' * 100)
  shutil.copytree(ended, folder / 'early')
  shutil.rmtree(folder / 'early' / 'checkpoints')
  return folder


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'init.path': ''},
      "init.path: expected the workdir .* got ''; set ",
    ),
    ({'init.path': '/no'}, "init.path: expected the workdir .*, got '/no'"),
    ({'init.path': '{tmp}/broken'}, 'broken/config.json: not JSON'),
    (
      {'init.path': '{tmp}/llama'},
      "architectures: expected .* 'no such model'",
    ),
    ({'init.path': '{tmp}/digits'}, "task 'language', got one of 'classif"),
    ({'init.path': '{tmp}/early'}, 'early: no checkpoint yet'),
    ({'data.path': '{tmp}/symbols.txt'}, "vocabulary: symbols 'ABC' are not"),
    ({'data.level': 'words'}, "data.level: expected '', the vocab.* 'words'"),
    ({'data.level': 'bytes'}, "data.level: expected '', as .* 29 characters"),
    ({'data.context_size': 17}, 'data.context_size: expected at most 16, the'),
    ({'model.lora.rank': -1}, 'lora.rank: expected 0 or more, got -1'),
    ({'model.lora.projections': ('query',)}, "lora.projections: .* 'query'"),
  ],
)
def test_mistakes_are_one_line(
  ended, tune, strange, tmp_path, changes, message
):
  changes = {
    key: value.format(tmp=strange) if isinstance(value, str) else value
    for key, value in changes.items()
  }
  with pytest.raises(ValueError, match=message) as error:
    loop.prepare(tune(ended, **changes), tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_parameters_of_another_model_raise(ended, tune):
  settings = tune(ended)
  settings.model.num_layers = 1
  with pytest.raises(ValueError, match='at step 3: unexpected gpt/block_1/'):
    tasks.create(settings)


def test_a_tokenizer_needs_to_fit_the_model(subwords, tune, tmp_path):
  folder = tmp_path / 'folder'
  shutil.copytree(subwords, folder)
  path = folder / 'tokenizer.json'
  path.unlink()
  with pytest.raises(ValueError, match="level: expected 'bytes' or .* got ''"):
    tasks.create(tune(folder))
  words = [f'{a} {b}{a}' for a in 'abcdefg' for b in 'hijkl']
  path.write_text(Subwords.learn(9 * words, 290).json)
  with pytest.raises(ValueError, match='json: expected at most 2.. tokens'):
    tasks.create(tune(folder))
  path.write_text('{}')
  with pytest.raises(ValueError, match='tokenizer.json: not a tokenizer.json'):
    tasks.create(tune(folder))


def test_a_model_without_counterpart_in_transformers_is_not_written(
  config, tmp_path
):
  task = tasks.create(config(**{'model.window': 3}))
  params = jax.jit(task.init)(jax.random.key(0))
  with pytest.raises(ValueError, match='window: expected None'):
    transformers_folder.save(tmp_path / 'out', task, params)
  assert not (tmp_path / 'out').exists()
