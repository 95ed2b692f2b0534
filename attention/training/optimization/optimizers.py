"""Optimizers and learning-rate schedules."""

import math

import jax
import jax.numpy as jnp
import optax

# Biases and norms, which have further axes in stacks of layers and per head.
_NOT_DECAYED = ('b', 'bias', 'gating_b', 'offset', 'output_b', 'scale')


def adamw(
  *,
  steps: int,
  learning_rate: float,
  warmup_steps: int = 0,
  final_fraction: float = 0.1,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  clip_norm: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW with warm-up, cosine decay and gradient clipping.

  AdamW is due to Loshchilov & Hutter (2019).

  Args:
    steps: step at which the decay ends.
    learning_rate: peak learning rate, reached at the end of warm-up.
    warmup_steps: number of steps of linear increase from 0.
    final_fraction: fraction of the peak learning rate left at `steps`.
    weight_decay: applied to matrices and embeddings, not to biases and norms,
      nor to other vectors.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    clip_norm: maximum global norm of the gradients.

  Returns:
    The gradient transformation, whose `update` takes the gradients' global norm
    as `grad_norm`, and the learning rate as a function of the step.

  Raises:
    ValueError: an argument is out of range.
  """
  for key, value, is_right, expected in (
    ('learning_rate', learning_rate, 0 < learning_rate < math.inf, 'above 0'),
    ('warmup_steps', warmup_steps, warmup_steps >= 0, '0 or more'),
    ('final_fraction', final_fraction, 0 <= final_fraction <= 1, 'in [0, 1]'),
    ('weight_decay', weight_decay, 0 <= weight_decay < math.inf, '0 or more'),
    ('b1', b1, 0 <= b1 < 1, 'in [0, 1)'),
    ('b2', b2, 0 <= b2 < 1, 'in [0, 1)'),
    ('clip_norm', clip_norm, clip_norm > 0, 'above 0'),
  ):
    if not is_right:
      raise ValueError(f'optimizer.{key}: expected {expected}, got {value}')
  warmup_steps = min(warmup_steps, steps)
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=learning_rate,
    warmup_steps=warmup_steps,
    decay_steps=max(steps, warmup_steps + 1),
    end_value=learning_rate * final_fraction,
  )
  transformation = optax.chain(
    _clip(clip_norm),
    optax.adamw(
      # Steps count from 1: at step 0 the learning rate would be 0.
      lambda count: schedule(count + 1),
      b1=b1,
      b2=b2,
      weight_decay=weight_decay,
      mask=_decayed,
    ),
  )
  return transformation, schedule


def _decayed(params):
  """Which parameters decay: a tree of booleans."""

  def is_decayed(path, p):
    return p.ndim > 1 and getattr(path[-1], 'key', None) not in _NOT_DECAYED

  return jax.tree_util.tree_map_with_path(is_decayed, params)


def _clip(max_norm):
  """Scale gradients above a global norm down to it.

  Optax's own would compute the norm, which the step needs too, once more.
  """

  def update(grads, state, params=None, *, grad_norm, **_):
    factor = jnp.minimum(1, jnp.divide(max_norm, grad_norm))
    return jax.tree.map(lambda g: factor * g, grads), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
