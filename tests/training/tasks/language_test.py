"""Language runs: subwords, model sizes, training in bfloat16."""

import json
import shutil

import jax
import numpy as np
import pytest

from attention import __main__ as cli
from attention.data.subwords import Subwords
from attention.training import loop, tasks, trained
from attention.training.optimization import optimizers, precision, step
from attention.training.parallelism import sharding
from attention.training.workdir import metrics, run_files

_MIXED = 'params=float32,compute=bfloat16,output=float32'
_BPE = {
  'data.level': 'bpe',
  'data.vocab_size': 270,
  'training.steps': 4,
  'training.log_every': 1,
  'training.eval_every': 4,
  'training.checkpoint_every': 2,
}


@pytest.fixture(scope='module')
def run(config, tmp_path_factory):
  """The workdir of a short run on subwords learnt from its text."""
  workdir = tmp_path_factory.mktemp('subwords') / 'run'
  loop.train(config(**_BPE), workdir)
  return workdir


def _outcome(workdir):
  """Return a run's metrics, except timings, and its parameters."""
  lines = [
    {k: v for k, v in line.items() if 'second' not in k}
    for line in metrics.read(workdir / 'metrics.jsonl')
  ]
  _, params = trained.load(workdir)
  return lines, [x.tobytes() for x in map(np.asarray, jax.tree.leaves(params))]


def test_a_resumed_subword_run_is_exact_and_relearns_no_tokenizer(
  config, run, tmp_path, monkeypatch
):
  copy = tmp_path / 'run'
  shutil.copytree(run, copy)
  shutil.rmtree(copy / 'checkpoints' / '4')
  monkeypatch.setattr(Subwords, 'learn', None)
  loop.train(config(**_BPE), copy)
  assert _outcome(copy) == _outcome(run)


def test_a_subword_model_is_used_without_its_text(run):
  task, params = trained.load(run)
  assert task.data is None
  assert 256 < task.vocabulary.size <= 270
  text = task.sample(params, 'the 🙂', 4, seed=0)
  assert text.startswith('the 🙂') and len(text) > 5
  labels, _, found = task.patterns(params, ' quick fox')['attention']
  assert ''.join(labels) == ' quick fox'
  assert next(iter(found.values())).shape[-1] == len(labels) < 10


def test_a_text_of_one_line_trains_and_is_sampled(config, tmp_path, capsys):
  (tmp_path / 'text.txt').write_text('one line without an end ' * 99)
  changes = {'data.path': str(tmp_path / 'text.txt'), 'training.steps': 1}
  loop.train(config(**changes), tmp_path / 'run')
  capsys.readouterr()
  words = ['sample', f'--workdir={tmp_path / "run"}', '--num_tokens=3']
  assert cli.main(words) == 0
  assert len(capsys.readouterr().out.strip('\n')) == 4


def test_bits_per_byte_match_the_loss(run, config):
  (values,) = (
    line for line in metrics.read(run / 'metrics.jsonl') if 'eval/loss' in line
  )
  data = tasks.create(config(**_BPE)).data
  bits = values['eval/loss'] * (len(data.validation) - 1) / np.log(2)
  text = data.vocabulary.decode(data.validation[1:])
  assert abs(values['eval/bits_per_byte'] - bits / len(text)) < 1e-6


def test_a_given_tokenizer_is_stored_with_the_run(config, tmp_path):
  path, workdir = tmp_path / 'tokenizer.json', tmp_path / 'run'
  path.write_text(Subwords.learn(['the quick brown fox'], 270).json)
  settings = config(**{'data.level': str(path)})
  task = tasks.create(settings)
  run_files.write(workdir, settings, task.record())
  (workdir / 'checkpoints' / '1').mkdir(parents=True)
  path.unlink()
  assert tasks.load(settings, workdir).vocabulary == task.vocabulary
  loop.prepare(settings, workdir)
  with pytest.raises(FileNotFoundError):
    loop.prepare(settings, tmp_path / 'other')
  path.write_text(json.dumps(task.record() | {'vocabulary': '{}'}))
  path.rename(workdir / 'data.json')
  with pytest.raises(ValueError, match=r'data.level: .*: not a tokenizer'):
    loop.prepare(settings, workdir)


@pytest.mark.parametrize(
  ('size', 'blocks', 'others'),
  [
    ('', 4 * (12 * 128**2 + 13 * 128), (64 + 2) * 128),
    ('base', 6 * (12 * 384**2 + 13 * 384), (256 + 2) * 384),
    ('gpt2', 12 * (12 * 768**2 + 13 * 768), (1024 + 2 + 50_304) * 768),
    ('debug', 2 * (12 * 16**2 + 13 * 16), (16 + 2) * 16),
  ],
)
def test_each_size_has_the_expected_shapes(config, size, blocks, others):
  settings = config(size=size)
  names = set(settings.model) | set(settings.data) | set(settings.training)
  assert names == {
    name for key in ('model', 'data', 'training') for name in config()[key]
  }
  settings.data.path = __file__  # long enough for every size
  if size == 'gpt2':
    settings.data.vocab_size = 300
  task = tasks.create(settings)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  if size != 'gpt2':
    others += task.vocabulary.size * settings.model.model_size
  assert sum(x.size for x in jax.tree.leaves(shapes)) == blocks + others
  assert task.batch_size % settings.training.num_microbatches == 0


def test_training_in_bfloat16_stays_near_float32(config):
  settings = config(**{'data.level': 'bpe', 'model.num_layers': 1})
  task = tasks.create(settings)
  optimizer, schedule = optimizers.adamw(steps=20, learning_rate=1e-2)
  mesh = sharding.make_mesh(1)
  losses = {}
  for policy in ('', _MIXED):
    with precision.applied(policy):
      train_step = jax.jit(step.make(task, optimizer, schedule, 0, mesh))
      state = step.init(task, optimizer, 0)
      losses[policy] = []
      for n in range(20):
        state, values = train_step(state, task.batch(n), np.int32(n))
        losses[policy].append(float(values['train/loss']))
  exact, mixed = map(np.array, losses.values())
  assert exact[-1] < exact[0] - 0.5
  assert (exact != mixed).any()
  np.testing.assert_allclose(mixed, exact, atol=0.03)
