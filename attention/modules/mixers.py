"""Baselines for attention: other layers that mix positions.

Each takes [b, t, m]. Its parameter count matches that of attention with four
(m, m) matrices as closely as a whole number of channels allows. Each is causal,
so trailing padding does not affect a sequence.
"""

import dataclasses
import math

import haiku as hk
import jax

from attention.modules.layers import Linear


@dataclasses.dataclass(kw_only=True, eq=False)
class LSTM(hk.Module):
  """A long short-term memory (Hochreiter & Schmidhuber 1997) and a projection.

  The number of channels n solves 4 n (m + n + 1) + (n + 1) m = 4 m (m + 1).
  """

  w_init: hk.initializers.Initializer | None = None  # of the projection
  name: str | None = None

  def __call__(self, x):
    """Map [b, t, m] to [b, t, m]."""
    width = x.shape[-1]
    b = 5 * width + 4
    c = 4 * width * (width + 1) - width
    channels = round((math.sqrt(b**2 + 16 * c) - b) / 8)
    cell = hk.LSTM(channels)
    states, _ = hk.dynamic_unroll(
      cell, x, cell.initial_state(len(x)), time_major=False
    )
    return Linear(width, w_init=self.w_init, name='linear')(states)


@dataclasses.dataclass(kw_only=True, eq=False)
class Convolution(hk.Module):
  """A causal convolution over three positions, GELU and a projection."""

  w_init: hk.initializers.Initializer | None = None
  name: str | None = None

  def __call__(self, x):
    """Map [b, t, m] to [b, t, m]."""
    width = x.shape[-1]
    x = hk.Conv1D(width, 3, padding=hk.pad.causal, w_init=self.w_init)(x)
    return Linear(width, w_init=self.w_init, name='linear')(jax.nn.gelu(x))


MIXERS = {'lstm': LSTM, 'conv': Convolution}
