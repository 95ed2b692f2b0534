"""Skip, count and report steps with a non-finite loss or gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NotFinite(RuntimeError):
  """Raised after too many consecutive bad steps."""


class BadSteps(NamedTuple):
  """Counts of bad steps, stored in the training state as int32 [4]."""

  total: object  # bad steps so far
  in_a_row: object  # consecutive bad steps, up to and including the last step
  first: object  # the first step of that streak, counted from 1
  leaf: object  # first parameter with a non-finite gradient, or -1 for none


def initial() -> jax.Array:
  return jnp.stack([jnp.int32(0)] * 3 + [jnp.int32(-1)])


def update(bad, is_good, is_counted, step, squares):
  """Return the updated `BadSteps` array after one step.

  Args:
    bad: [4] int32, the array before the step.
    is_good: whether the loss and all gradients are finite.
    is_counted: whether a non-finite step counts as bad.
    step: step number, counted from 1.
    squares: [n], squared norm of each parameter's gradient.
  """
  bad = BadSteps(*bad)
  is_bad = ~is_good & is_counted
  starts = is_bad & (bad.in_a_row == 0)
  finite = jnp.isfinite(squares)
  leaf = jnp.where(finite.all(), -1, jnp.argmin(finite))
  return jnp.stack(
    BadSteps(
      total=bad.total + is_bad,
      in_a_row=jnp.where(is_good, 0, bad.in_a_row + is_bad),
      first=jnp.where(starts, step, bad.first),
      leaf=jnp.where(starts, leaf, bad.leaf),
    )
  ).astype(jnp.int32)


_NOTHING = ((), 0)


class Watch:
  """Checks the `BadSteps` of each call one call late, to avoid blocking."""

  def __init__(self, params, max_bad_steps: int, warn):
    """Create a watch.

    Args:
      params: parameter tree; only its paths are used, in messages.
      max_bad_steps: number of consecutive bad steps that raises `NotFinite`.
      warn: called with one line of text for every bad step.
    """
    self._names = [
      '/'.join(str(key.key) for key in path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    self._max, self._warn = max_bad_steps, warn
    self._before, self._pending = None, _NOTHING

  def note(self, bad, count: int = 1) -> None:
    """Store the arrays of the newest call, and check those of the one before.

    Args:
      bad: an array per step, stacked.
      count: number of steps; further rows are not in use.

    Raises:
      NotFinite: after `max_bad_steps` consecutive bad steps; the message names
        the first of them and the parameter.
    """
    pending, self._pending = self._pending, (bad, count)
    self._check(*pending)

  def flush(self) -> None:
    """Check the newest arrays as well; raises like `note`."""
    pending, self._pending = self._pending, _NOTHING
    self._check(*pending)

  def _check(self, bad, count):
    for row in np.asarray(bad)[:count]:
      self._check_step(BadSteps(*row.tolist()))

  def _check_step(self, bad):
    before, self._before = self._before, bad
    what = (
      'the loss' if bad.leaf < 0 else f'the gradient of {self._names[bad.leaf]}'
    )
    if bad.in_a_row >= self._max:
      raise NotFinite(
        f'{what} has not been finite for {bad.in_a_row} consecutive steps, '
        f'starting at step {bad.first:,}; these steps did not change the '
        'parameters. Try a lower --config.optimizer.learning_rate, or check '
        'the data'
      )
    if bad.in_a_row and (before is None or bad.total > before.total):
      self._warn(
        f'warning: {what} is not finite at step '
        f'{bad.first + bad.in_a_row - 1:,}; step skipped ({bad.in_a_row} in a '
        f'row, {bad.total} in total)'
      )
