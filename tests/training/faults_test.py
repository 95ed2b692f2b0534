"""Non-finite steps in runs (docs/guides/reliability.md)."""

import jax
import numpy as np
import pytest

from attention.training import command_line, loop
from attention.training import main as training_main
from attention.training.optimization.nonfinite import NotFinite
from attention.training.tasks.language import Language
from attention.training.workdir import metrics


@pytest.fixture
def poison(monkeypatch):
  """poison(*steps): makes the loss NaN at these steps."""
  batch, loss = Language.batch, Language.loss

  def poison(*steps):
    def poisoned_batch(self, n):
      value = np.nan if n + 1 in steps else 1.0
      clean = batch(self, n)
      return clean | {'poison': np.full(len(clean['tokens']), value, 'f')}

    def poisoned_loss(self, params, rng, batch):
      total, count = loss(self, params, rng, batch)
      return total * batch['poison'].mean(), count

    monkeypatch.setattr(Language, 'batch', poisoned_batch)
    monkeypatch.setattr(Language, 'loss', poisoned_loss)

  return poison


def _tiny(config, **changes):
  tiny = {
    'model.num_layers': 1,
    'training.steps': 9,
    'training.eval_every': 9,
    'training.log_every': 1,
  }
  return config(**(tiny | changes))


def _assert_finite(state):
  for leaf in jax.tree.leaves(state):
    assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  'steps',
  [[4], [1, 4, 5, 6, 7]],
  ids=['one', 'one_below_the_limit'],
)
def test_bad_steps_are_skipped_and_counted(
  config, tmp_path, capsys, poison, steps, newest_state
):
  poison(*steps)
  loop.train(_tiny(config), tmp_path / 'run')
  lines = metrics.read(tmp_path / 'run' / 'metrics.jsonl')
  assert lines[-1]['eval/loss'] > 0
  counted = {x['step']: x['train/bad_steps'] for x in lines[:9]}
  assert counted[9] == len(steps)
  assert {x['step'] for x in lines[:9] if 'train/loss' not in x} == set(steps)
  step, state = newest_state(tmp_path / 'run')
  assert step == 9
  _assert_finite(state)
  # Every good step incremented the optimizer's count.
  counts = [x for x in jax.tree.leaves(state['optimizer']) if np.ndim(x) == 0]
  assert counts == [9 - len(steps)] * len(counts) != []
  assert f'{len(steps)} in total' in capsys.readouterr().out


def test_too_many_bad_steps_end_the_run_with_the_parameter_name(
  config, tmp_path, capsys, poison, monkeypatch, newest_state
):
  poison(*range(4, 99))
  settings = _tiny(config, **{'training.steps': 30})
  monkeypatch.setattr(
    command_line,
    'parse',
    lambda _: command_line.Arguments(settings, tmp_path / 'run'),
  )
  monkeypatch.setattr(training_main, 'set_up_jax', lambda *_: None)
  assert training_main.main(['train.py']) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert 'the gradient of gpt/' in error
  assert 'finite for 5 consecutive steps, starting at step 4;' in error
  step, state = newest_state(tmp_path / 'run')
  assert step in (8, 9)
  _assert_finite(state)
  with pytest.raises(NotFinite, match='for [67] consecutive .* at step 4;'):
    loop.train(settings, tmp_path / 'run')
