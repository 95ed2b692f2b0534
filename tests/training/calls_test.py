"""Calls end where something follows a step, and keep to one shape."""

import numpy as np
import pytest

from attention.training.calls import Calls
from attention.training.training_config import TrainingConfig


class _Task:
  """Batches of the lengths given; counts how often each is made."""

  def __init__(self, lengths):
    self.lengths, self.made = lengths, []

  def batch(self, n):
    self.made.append(n)
    return {'x': np.full((2, self.lengths[n]), n)}


def _calls(lengths, ends=(), start=0, **settings):
  """Return the steps of each call, and the task."""
  every = {'log_every': 10, 'eval_every': 10, 'checkpoint_every': 10}
  settings = TrainingConfig(steps=len(lengths), **every | settings)
  task = _Task(lengths)
  calls, done, found = Calls(task, settings, ends), start, []
  while done < len(lengths):
    batches = calls.batches(done)
    found.append([int(batch['x'][0, 0]) for batch in batches])
    done += len(batches)
  return found, task


def _sizes(*args, **settings):
  return [len(call) for call in _calls(*args, **settings)[0]]


def test_each_step_is_a_call_by_default():
  assert _calls([8] * 4)[0] == [[0], [1], [2], [3]]


def test_calls_end_where_something_follows():
  limit = {'steps_per_call': 8}
  assert _sizes([8] * 25, **limit) == [1, 7, 2, 6, 4, 4, 1]
  assert _sizes([8] * 25, start=10, **limit) == [6, 4, 4, 1]
  assert _sizes([8] * 16, ends=(3, 5), **limit) == [1, 2, 2, 3, 2, 6]


@pytest.mark.parametrize('key', ['log_every', 'eval_every', 'checkpoint_every'])
def test_calls_end_at_multiples_of(key):
  every = dict.fromkeys(('log_every', 'eval_every', 'checkpoint_every'), 100)
  sizes = _sizes([8] * 12, steps_per_call=12, **every | {key: 5})
  assert sizes == [1, 4, 5, 2]


def test_batches_of_a_call_have_one_shape_and_are_made_once():
  lengths = [8, 8, 8, 16, 16, 8, 8, 8]
  found, task = _calls(lengths, steps_per_call=8)
  assert found == [[0], [1, 2], [3, 4], [5, 6, 7]]
  assert task.made == list(range(8))
