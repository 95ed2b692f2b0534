"""Training runs: learning, stopping, exact resumption and their output."""

import json
import re
import shlex
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest

from attention import __main__ as cli
from attention.commands import doctor
from attention.interop import transformers
from attention.training import loop, tasks, trained
from attention.training.optimization import optimizers, step
from attention.training.tasks.language import Language
from attention.training.workdir import metrics, run_files
from attention.training.workdir.checkpoints import Checkpoints, abstract


def _state(workdir):
  """Return the newest step, and its state as a flat dict of arrays."""
  config = run_files.load_config(workdir)
  task = tasks.load(config, workdir)
  optimizer, _ = optimizers.adamw(
    steps=config.training.steps, **config.optimizer
  )
  shapes = jax.eval_shape(lambda: step.init(task, optimizer, config.seed))
  checkpoints = Checkpoints(workdir / 'checkpoints')
  newest = checkpoints.latest_step()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = checkpoints.restore(newest, abstract(shapes, device))
  return newest, {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def _figures(workdir):
  """Return a run's metrics, except timings."""
  return [
    {k: v for k, v in line.items() if 'second' not in k}
    for line in metrics.read(workdir / 'metrics.jsonl')
  ]


def _assert_same_run(one, two):
  (step_one, state_one), (step_two, state_two) = _state(one), _state(two)
  assert step_one == step_two
  assert state_one.keys() == state_two.keys()
  for path, leaf in state_one.items():
    assert leaf.tobytes() == state_two[path].tobytes(), path
  assert _figures(one) == _figures(two)


def test_a_run_learns_and_writes_its_files(config, tmp_path, capsys):
  workdir = tmp_path / 'run'
  loop.train(config(**{'optimizer.learning_rate': 1e-2}), workdir)
  lines = metrics.read(workdir / 'metrics.jsonl')
  assert [x['step'] for x in lines if 'train/loss' in x] == [
    1, 5, 10, 15, 20, 25, 30
  ]  # fmt: skip
  losses = [x['eval/loss'] for x in lines if 'eval/loss' in x]
  assert len(losses) == 2
  assert losses[1] < losses[0] < np.log(29)
  assert json.loads((workdir / 'env.json').read_text())['backend'] == 'cpu'
  assert (workdir / 'plots' / 'loss.png').read_bytes().startswith(b'\x89PNG')
  assert len((workdir / 'samples' / '00000030.txt').read_text()) == 201
  assert sorted(p.name for p in (workdir / 'checkpoints').iterdir()) == [
    '10', '20', '30'
  ]  # fmt: skip
  output = capsys.readouterr().out
  for word in ('backend', 'parameters', 'data', 'sha256', 'compiling'):
    assert word in output
  assert 'step 30/30  loss' in output
  assert f'a sample, saved to {tmp_path}' in output
  assert output.endswith(
    f'checkpoints/30 and {workdir}/plots; to use the model: python -m '
    f'attention sample --workdir={workdir}\n'
  )


def test_a_run_with_products_in_bfloat16_learns_and_resumes_to_the_same_bytes(
  config, tmp_path, capsys
):
  changes = {
    'training.precision': 'products=bfloat16',
    'optimizer.learning_rate': 1e-2,
  }
  whole, again = tmp_path / 'whole', tmp_path / 'again'
  loop.train(config(**changes), whole)
  losses = [x['eval/loss'] for x in _figures(whole) if 'eval/loss' in x]
  assert losses[1] < losses[0] < np.log(29)
  assert {leaf.dtype.name for leaf in _state(whole)[1].values()} <= {
    'float32',
    'int32',
  }
  shutil.copytree(whole, again)
  for number in '20', '30':
    shutil.rmtree(again / 'checkpoints' / number)
  capsys.readouterr()
  loop.train(config(**changes), again)
  assert 'resumed from step 10' in capsys.readouterr().out
  _assert_same_run(whole, again)
  with pytest.raises(ValueError, match='training.precision'):
    loop.train(config(**(changes | {'training.precision': ''})), again)


def test_restarting_a_finished_run_changes_nothing(
  config, ended, tmp_path, capsys
):
  shutil.copytree(ended, tmp_path / 'run')
  names = 'metrics.jsonl', 'config.json', 'env.json', 'data.json'
  before = [(tmp_path / 'run' / name).read_bytes() for name in names]
  for steps in 3, 2:
    capsys.readouterr()
    loop.train(config(**{'training.steps': steps}), tmp_path / 'run')
    output = capsys.readouterr().out
    assert 'this run is at step 3' in output
    assert '--config.training.steps' in output
    assert 'compil' not in output
    assert 'schedule' not in output
    assert [(tmp_path / 'run' / name).read_bytes() for name in names] == before


def test_more_steps_continue_the_run_with_a_new_schedule(
  config, ended, tmp_path, capsys
):
  shutil.copytree(ended, tmp_path / 'run')
  loop.train(config(**{'training.steps': 7}), tmp_path / 'run')
  output = capsys.readouterr().out
  assert 'steps: 3 → 7; the learning-rate schedule changes' in output
  assert 'resumed from step 3' in output
  lines = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert lines[-1]['step'] == 7


def test_evaluation_matches_the_logits_and_ignores_padding(config, tmp_path):
  settings = config()
  task = tasks.create(settings)
  params = task.init(jax.random.key(0))
  tokens = task.data.validation
  total = 0.0
  for start in range(0, len(tokens) - 1, 16):
    part = tokens[start : start + 17]
    logits = np.asarray(task.apply(params, part[None, :-1]), np.float64)[0]
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    total -= logits[np.arange(len(part) - 1), part[1:]].sum()
  expected = total / (len(tokens) - 1)
  actual = task.evaluate(params, jax.device_put)['eval/loss']
  assert abs(actual - expected) < 1e-5


def test_weight_decay_applies_to_matrices_not_to_biases_and_norms():
  optimizer, schedule = optimizers.adamw(
    steps=10, learning_rate=0.1, warmup_steps=2, weight_decay=0.5
  )
  decayed = {'w': (2, 2), 'query_w': (3, 2, 2), 'lora_b': (2, 2)}
  # In a stack of three layers, norms and biases have an axis more.
  others = {'b': (2,), 'sinks': (2,), 'scale': (3, 2), 'gating_b': (3, 2, 2)}
  params = {k: np.ones(v, 'f') for k, v in (decayed | others).items()}
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = optimizer.update(
    zeros, optimizer.init(params), params, grad_norm=0.0
  )
  for name in decayed:
    np.testing.assert_allclose(updates[name], -0.05 * 0.5, rtol=1e-6)
  assert not any(updates[name].any() for name in others)
  rates = [float(schedule(n)) for n in (1, 2, 10)]
  np.testing.assert_allclose(rates, [0.05, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize('scale', [0.1, 10.0])
def test_gradients_are_clipped_as_by_optax(scale, assert_close):
  params = {'w': np.ones((2, 2), 'f')}
  grads = {'w': np.array([[1, 2], [3, 4]], 'f') * scale}
  expected, _ = optax.clip_by_global_norm(2.0).update(grads, None)
  optimizer, _ = optimizers.adamw(
    steps=10, learning_rate=0.1, b1=0.5, clip_norm=2.0
  )
  norm = optax.tree.norm(grads)
  _, state = optimizer.update(
    grads, optimizer.init(params), params, grad_norm=norm
  )
  assert_close(2 * optax.tree.get(state, 'mu')['w'], expected['w'])


def _wait(condition, process, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end, 'took too long'
    time.sleep(0.01)


@pytest.fixture
def words(text, tmp_path):
  """words(name): arguments of a run that lasts seconds after it saves."""

  def make(name):
    return [
      '--config=configs/gpt_char.py:debug',
      f'--config.data.path={text}',
      f'--workdir={tmp_path / name}',
      '--config.training.tensorboard=False',
      '--config.training.steps=400',
      '--config.training.checkpoint_every=70',
      '--config.training.eval_every=200',
    ]

  return make


def _has_checkpoint(workdir):
  return any(p.name.isdigit() for p in workdir.glob('checkpoints/*'))


def test_a_killed_run_resumes_to_the_same_bytes(words, python, tmp_path):
  killed, workdir = python('train.py', *words('killed')), tmp_path / 'killed'
  _wait(lambda: _has_checkpoint(workdir), killed)
  killed.send_signal(signal.SIGKILL)
  assert killed.wait() == -signal.SIGKILL
  assert _figures(workdir)[-1]['step'] < 400
  whole = python('train.py', *words('whole'))
  error = whole.communicate(timeout=200)[1]
  assert whole.returncode == 0, error
  resumed = python('train.py', *words('killed'))
  output, error = resumed.communicate(timeout=200)
  assert resumed.returncode == 0, error
  assert 'resumed from step' in output
  _assert_same_run(tmp_path / 'whole', workdir)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_prints_how_to_resume(
  words, train_here, tmp_path, monkeypatch, capsys, number
):
  batch = Language.batch

  def batch_and_signal(self, n):
    if n == 17:
      signal.raise_signal(number)
    return batch(self, n)

  monkeypatch.setattr(Language, 'batch', batch_and_signal)
  assert train_here(*words('stopped')) == 0
  name = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}[number]
  output = capsys.readouterr().out
  # The signal comes in the call of steps 16 to 20.
  assert f'stopped by {name} at step 20; ' in output
  command = output.split('to resume, run the same command again: ')[1]
  assert shlex.split(command) == ['python', 'train.py', *words('stopped')]
  workdir = tmp_path / 'stopped'
  assert _state(workdir)[0] == 20
  assert _figures(workdir)[-1]['step'] == 20


def test_metrics_after_the_restored_step_are_removed(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "train/loss": 3.0}\n{"step": 5, "train/loss": 2.0}\n'
    '{"step": 9, "train/loss": 1.0}\n{"step": 10, "tra'
  )
  log = metrics.Metrics(path, step=5)
  log.write(6, {'train/loss': np.float32(0.5)})
  log.close()
  assert metrics.read(path) == [
    {'step': 1, 'train/loss': 3.0},
    {'step': 5, 'train/loss': 2.0},
    {'step': 6, 'train/loss': 0.5},
  ]


def test_sample_continues_the_prompt(ended, capsys):
  capsys.readouterr()
  words = ['sample', f'--workdir={ended}', '--num_tokens=11', '--top_k=3']
  assert cli.main([*words, '--prompt=the lazy']) == 0
  first = capsys.readouterr().out
  assert first.startswith('the lazy')
  assert len(first) == len('the lazy') + 11 + 1
  task, params = trained.load(ended)
  options = dict(seed=0, top_k=3, temperature=0.8)
  assert task.sample(params, 'the lazy', 11, **options) + '\n' == first
  assert cli.main([*words, '--prompt=the lazy', '--seed=0']) == 0
  assert capsys.readouterr().out == first
  # Of a prompt longer than the context, only the end is used.
  assert cli.main([*words, '--prompt=' + 'the fox ' * 9]) == 0
  capsys.readouterr()
  for word, message in (
    ('--prompt=A?', "prompt: symbols '?A'"),
    ('--prompt=', 'prompt: exp'),
    ('--temperature=-1', 'temperature: expected 0 or more'),
    ('--top_k=0', 'top_k: expected 1 or more'),
  ):
    assert cli.main([*words, word]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_model_can_be_saved_as_gpt2(ended, tmp_path):
  task, params = trained.load(ended)
  transformers.save(tmp_path, task.model_fields, params)
  fields, again = transformers.load(tmp_path)
  assert fields.pop('model') == 'gpt'
  assert fields.items() <= task.model_fields.items()
  jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('data', None, 'no such file'),
    ('data', '{}', 'expected an object with sha256'),
    ('config', '{', 'not JSON: '),
    ('config', '{}', 'expected an object with task, data, model, training'),
    ('config', '[]', 'expected an object with task'),
  ],
)
def test_errors_name_invalid_records(ended, tmp_path, name, content, message):
  for file in ('config.json', 'data.json'):
    shutil.copy(ended / file, tmp_path)
  path = tmp_path / f'{name}.json'
  path.unlink() if content is None else path.write_text(content)
  with pytest.raises(ValueError, match=f'{path}: {message}'):
    trained.load(tmp_path)


def test_sample_needs_a_run_with_a_checkpoint(ended, tmp_path, capsys):
  words = ['sample', f'--workdir={tmp_path / "run"}']
  assert cli.main(words) == 2
  assert 'no run here' in capsys.readouterr().err
  shutil.copytree(ended, tmp_path / 'run')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  capsys.readouterr()
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert 'no checkpoint' in error
  assert error.count('\n') == 1


def test_doctor_prints_versions_devices_and_implementations(capsys):
  assert cli.main(['doctor']) == 0
  output = capsys.readouterr().out
  assert jax.__version__ in output
  assert 'cpu' in output
  assert output.count('chosen') == 2
  speed = re.search(r'bfloat16 products ([\d.]+) × the speed of', output)
  assert 0.05 < float(speed[1]) < 20


@pytest.mark.parametrize(
  ('speed', 'expected'),
  [
    (0.7349, '0.73 × the speed of float32: keep float32'),
    (
      1.62,
      '1.6 × the speed of float32: '
      '--config.training.precision=products=bfloat16',
    ),
  ],
)
def test_doctor_advises_by_the_speed_of_products(speed, expected, monkeypatch):
  monkeypatch.setattr(doctor, 'measure_bfloat16_products', lambda: speed)
  assert doctor.bfloat16_products() == expected
