"""Classification runs: training, resuming, plots, accuracy on the digits."""

import json

import jax
import numpy as np
import pytest

import attention.__main__ as cli
from attention import plots
from attention.training import command_line, loop, tasks

pytest.importorskip('sklearn')


def _texts(tmp_path):
  for i in range(20):
    for label in ('up', 'down'):
      path = tmp_path / 'texts' / label / f'{i}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(f'it went {label} on day {i}')
  return tmp_path / 'texts'


def test_digits_train_and_draw_a_confusion_matrix(
  tmp_path, monkeypatch, capsys
):
  config = command_line.load_config('configs/digits.py:debug')
  units = []
  monkeypatch.setattr(
    plots, 'loss_curve', lambda _, __, unit: units.append(unit)
  )
  (tmp_path / 'plots').mkdir()
  loop.train(config, tmp_path)
  assert set(units) == {'nats per example'}
  output = capsys.readouterr().out
  assert 'most frequent confusions, saved to' in output
  assert 'python -m attention evaluate --workdir=' in output
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  last = json.loads(lines[-1])
  assert last['step'] == 30
  assert 0 < last['eval/accuracy'] < 1
  assert (tmp_path / 'plots' / 'confusion.png').stat().st_size > 1000
  sample = (tmp_path / 'samples' / '00000030.txt').read_text()
  assert ' mistaken for ' in sample


@pytest.mark.slow
def test_a_text_run_learns_resumes_and_plots(tmp_path, capsys):
  config = command_line.load_config('configs/classify_text.py:debug')
  config.data.path = str(_texts(tmp_path))
  config.optimizer.learning_rate = 1e-2
  config.optimizer.weight_decay = 0.0
  run = tmp_path / 'run'
  config.training.steps = 20
  loop.train(config, run)
  config.training.steps = 60
  loop.train(config, run)
  last = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
  assert (last['step'], last['eval/accuracy']) == (60, 1)
  words = ['plot', f'--workdir={run}']
  assert cli.main([*words, '--text=it went up']) == 0
  printed = capsys.readouterr().out
  assert "predicted class: 'up'" in printed
  page = (run / 'plots' / 'attention.html').read_text()
  assert '"queries": ["it", "went", "up"]' in page
  for text, message in (
    ('one ' * 17, 'text: expected 1 to 16 tokens (the context_size), got 17'),
    ('', 'text: expected 1 to 16 tokens'),
  ):
    assert cli.main([*words, f'--text={text}']) == 2
    assert message in capsys.readouterr().err


def test_a_task_loads_without_its_data():
  for name in ('digits', 'classify_text'):
    config = command_line.load_config(f'configs/{name}.py:debug')
    task = tasks.create(config)
    record = json.loads(json.dumps(task.record()))
    loaded = type(task).load(config, record)
    shapes = [jax.eval_shape(t.init, jax.random.key(0)) for t in (task, loaded)]
    assert shapes[0] == shapes[1]
    assert list(loaded.labels) == list(task.labels)
    assert loaded.model_fields == task.model_fields
    assert loaded.model_fields['num_classes'] == len(task.labels)


@pytest.mark.slow
def test_digits_reach_98_percent_over_three_seeds(tmp_path):
  accuracies = []
  for seed in range(3):
    config = command_line.load_config('configs/digits.py')
    config.seed = seed
    loop.train(config, tmp_path / str(seed))
    lines = (tmp_path / str(seed) / 'metrics.jsonl').read_text().splitlines()
    accuracies.append(json.loads(lines[-1])['eval/accuracy'])
  assert np.mean(accuracies) >= 0.98, accuracies
