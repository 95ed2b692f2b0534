"""Steps whose loss or gradients aren't finite: skipped, counted, named."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NotFinite(RuntimeError):
  """Too many bad steps, one after another."""


class Bad(NamedTuple):
  """What is known of bad steps; a state holds it as int32 [4]."""

  total: object  # bad steps so far
  in_a_row: object  # up to the last step
  first: object  # the first of that row, counted from 1
  leaf: object  # the first parameter whose gradient wasn't finite; -1: none


def initial() -> jax.Array:
  return jnp.stack([jnp.int32(0)] * 3 + [jnp.int32(-1)])


def update(bad, is_good, is_counted, step, norms):
  """`Bad` after one more step, as an array.

  Args:
    bad: [4] int32, before it.
    is_good: whether loss and gradients are finite.
    is_counted: whether it is a bad step if not.
    step: counted from 1.
    norms: [n], of each parameter's gradient.
  """
  bad = Bad(*bad)
  is_bad = ~is_good & is_counted
  starts = is_bad & (bad.in_a_row == 0)
  finite = jnp.isfinite(norms)
  leaf = jnp.where(finite.all(), -1, jnp.argmin(finite))
  return jnp.stack(
    Bad(
      total=bad.total + is_bad,
      in_a_row=jnp.where(is_good, 0, bad.in_a_row + is_bad),
      first=jnp.where(starts, step, bad.first),
      leaf=jnp.where(starts, leaf, bad.leaf),
    )
  ).astype(jnp.int32)


class Watch:
  """Looks at each step's `Bad`, a step late, so as not to wait for it."""

  def __init__(self, params, max_bad_steps: int, warn):
    """Takes the parameters' tree, for their names."""
    self._names = [
      '/'.join(str(key.key) for key in path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    self._max, self._warn = max_bad_steps, warn
    self._before = self._pending = None

  def note(self, bad) -> None:
    """Takes the newest, and looks at the one before it.

    Raises:
      NotFinite: names the first bad step of the row, and the parameter.
    """
    pending, self._pending = self._pending, bad
    self._look(pending)

  def flush(self) -> None:
    """Looks at the newest too. Raises as `note` does."""
    pending, self._pending = self._pending, None
    self._look(pending)

  def _look(self, bad):
    if bad is None:
      return
    bad = Bad(*np.asarray(bad).tolist())
    before, self._before = self._before, bad
    what = (
      'the loss' if bad.leaf < 0 else f'the gradient of {self._names[bad.leaf]}'
    )
    if bad.in_a_row >= self._max:
      raise NotFinite(
        f'from step {bad.first:,} on, {bad.in_a_row} steps in a row, {what} '
        'is not finite; no such step changed the parameters. A lower '
        '--config.optimizer.learning_rate may help, or a look at the data'
      )
    if bad.in_a_row and (before is None or bad.total > before.total):
      self._warn(
        f'warning: {what} is not finite at step '
        f'{bad.first + bad.in_a_row - 1:,}: skipped ({bad.in_a_row} in a row, '
        f'{bad.total} in all)'
      )
