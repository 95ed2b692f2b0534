"""Low-rank adaptation of linear layers (Hu et al. 2021, "LoRA")."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.layers import linear

# The linear layers of attention and feed-forward layers.
PROJECTIONS = (
  'query',
  'key',
  'value',
  'qkv',
  'linear',
  'expand',
  'gate',
  'contract',
)
_LEAVES = ('lora_a', 'lora_b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """Adds low-rank updates to linear layers of any Haiku function.

  `x w + b` becomes `x w + b + alpha / rank · (x A) B`. Each adapted layer gets
  the parameters `lora_a` (m, rank) and `lora_b` (rank, o) beside its own, which
  keep their names. As in peft, A is drawn uniformly from ±1/√m, and B is zero,
  so that the function is unchanged at first.

  Layers are instances of `hk.Linear`, including `Linear`, chosen by the name of
  their module.

  Raises:
    ValueError: a field with an impossible value.
  """

  rank: int = 0  # 0: no updates
  alpha: float = 16.0  # the updates are scaled by alpha / rank
  projections: Sequence[str] = ()  # names of layers; (): those of PROJECTIONS

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f'lora.rank: expected 0 or more, got {self.rank}')
    if not 0 < self.alpha < math.inf:
      raise ValueError(f'lora.alpha: expected above 0, got {self.alpha}')
    if isinstance(self.projections, str):
      raise ValueError(
        f"lora.projections: expected names such as ('query', 'value'), got "
        f'{self.projections!r}'
      )

  @contextlib.contextmanager
  def applied(self):
    """Adapts the layers that are called in this context.

    Enter it inside the function that `hk.transform` transforms; JAX may
    otherwise reuse a program that was traced without it.

    Raises:
      ValueError: on exit, if no layer has one of the names.
    """
    if not self.rank:
      yield
      return
    found = set()

    def adapt(call, args, kwargs, context):
      layer = context.module
      if not isinstance(layer, hk.Linear) or context.method_name != '__call__':
        return call(*args, **kwargs)
      found.add(layer.name)
      outputs = call(*args, **kwargs)
      if layer.name not in (self.projections or PROJECTIONS):
        return outputs
      x = args[0] if args else kwargs['inputs']
      return outputs + self._update(x, layer, kwargs.get('precision'))

    with hk.intercept_methods(adapt):
      yield
    self._check(found)

  def _update(self, x, layer, precision):
    """alpha / rank · (x A) B, in the scope of the layer."""
    a, b = _LEAVES
    size = x.shape[-1]
    limit = 1 / math.sqrt(size)
    init = hk.initializers.RandomUniform(-limit, limit)
    down = hk.get_parameter(a, (size, self.rank), x.dtype, init)
    up = hk.get_parameter(b, (self.rank, layer.output_size), x.dtype, jnp.zeros)
    hidden = linear(x, down, precision=precision)
    return self.alpha / self.rank * linear(hidden, up, precision=precision)

  def _check(self, found):
    missing = [name for name in self.projections if name not in found]
    if not self.projections and not found.intersection(PROJECTIONS):
      missing = list(PROJECTIONS)
    if missing:
      raise ValueError(
        f'lora.projections: expected names among {sorted(found)}, the linear '
        f'layers of this model, got {missing[0]!r}'
      )


def adapted(method):
  """Decorates a method of a module whose field `lora` is a dict of `Lora`."""

  @functools.wraps(method)
  def call(self, *args, **kwargs):
    with Lora(**(self.lora or {})).applied():
      return method(self, *args, **kwargs)

  return call


def is_adapter(module: str, name: str, value=None) -> bool:
  """Whether a parameter is a low-rank update.

  For `hk.data_structures.partition`, which separates updates from the rest.
  """
  del module, value
  return name in _LEAVES


def merge(params: dict, *, alpha: float) -> dict:
  """Adds the low-rank updates to the weights of their layers.

  Args:
    params: {module: {name: array}} of a function adapted by `Lora`.
    alpha: as in `Lora`.

  Returns:
    The parameters of the function without `Lora`. Weights are added in float32
    and keep their dtypes.
  """
  updates, rest = hk.data_structures.partition(is_adapter, params)
  merged = {module: dict(leaves) for module, leaves in rest.items()}
  for module, leaves in updates.items():
    a, b = (leaves[name].astype(jnp.float32) for name in _LEAVES)
    update = (
      alpha / a.shape[-1] * jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    )
    w = merged[module]['w']
    merged[module]['w'] = (w.astype(jnp.float32) + update).astype(w.dtype)
  return merged
