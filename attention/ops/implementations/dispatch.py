"""The table of implementations, and the choice of one for each platform."""

import dataclasses

from jax import lax

from attention.ops.implementations import cudnn, partitioning, reference
from attention.ops.implementations.base import (
  ByPlatform,
  Implementation,
  OverMesh,
  Partitioned,
  Unsupported,
)
from attention.ops.implementations.chunked import Chunked, TileLoop
from attention.ops.implementations.exchange import Heads, Striped
from attention.ops.implementations.fused import Cpu, Tpu, Triton
from attention.ops.implementations.ring import Ring
from attention.ops.platforms import (
  PARTITIONED_TPUS,
  PLATFORMS,
  default_platform,
)


@dataclasses.dataclass(frozen=True)
class _Missing(Implementation):
  """Placeholder for a name without an implementation on the platform."""

  platform: str

  def refusal(self, *_):
    return f'no kernel for platform {self.platform!r}'


# By name and by platform; None stands for all other platforms.
_IMPLEMENTATIONS = {
  'fused': {'cpu': Cpu(), 'cuda': Triton(), 'tpu': Tpu()},
  'chunked': {'cpu': Chunked(), None: Chunked(is_cpu=False)},
  'reference': {None: reference.Reference()},
  'cudnn': {'cuda': cudnn.Cudnn()},
}
# Best first.
_DEFAULT = ('fused', 'chunked', 'reference')


def dispatch(implementation, *checked):
  """Run the implementation that is chosen for the lowering platform.

  Args:
    implementation: as in `dot_product_attention`.
    *checked: query, key, value and `Options`.

  Returns:
    [*b, q, h, e].

  Raises:
    NotImplementedError: the arguments are unsupported on every platform.
  """
  dispatched = Dispatched(tuple(names_of(implementation)))
  chosen = dispatched.choose(*checked)
  axes = partitioning.axes_in_context(*checked)
  if axes is None:
    return chosen(*checked)
  if 't' in axes:
    dispatched = OverPositions(axes['t'], dispatched)
  return OverMesh(dispatched, tuple(axes.items()))(*checked)


@dataclasses.dataclass(frozen=True)
class Dispatched(Implementation):
  """For each platform, the first of some implementations that suits."""

  names: tuple  # in order of preference

  def choose(self, *checked) -> Implementation:
    """Return the choice for these arguments; shapes suffice.

    Raises:
      NotImplementedError: the arguments are unsupported on every platform.
    """
    choices = {
      p: _choose(self.names, p, *checked)
      for p in (*PLATFORMS, PARTITIONED_TPUS)
    }
    chosen = set(choices.values())
    if all(isinstance(c, Unsupported) for c in chosen):
      raise NotImplementedError(choices[default_platform()].reason)
    if len(chosen) == 1:
      return chosen.pop()
    return ByPlatform(
      tuple(
        (p, c if 'tpu' in p else Partitioned(c)) for p, c in choices.items()
      )
    )

  def of_blocks(self, *checked):
    choices = {p: _choose(self.names, p, *checked) for p in PLATFORMS}
    return ByPlatform(
      tuple(
        (p, c.of_blocks(*checked) or TileLoop()) for p, c in choices.items()
      )
    )

  def forward(self, *checked):
    return self.choose(*checked).forward(*checked)

  def backward(self, *checked_and_more):
    return self.choose(*checked_and_more[:4]).backward(*checked_and_more)


@dataclasses.dataclass(frozen=True)
class OverPositions(Implementation):
  """Attention in `shard_map`, over a mesh axis that cuts positions.

  Heads are exchanged where there are enough. Otherwise keys and values travel
  around a ring, and causal work is balanced by stripes.
  """

  axis_name: object  # a mesh axis, or several
  dispatched: Dispatched
  is_striped: bool = False
  method: str | None = None  # 'heads' or 'ring'

  def choose(self, query, key, value, options) -> Implementation:
    """Return the choice for one device's arguments.

    Raises:
      ValueError: heads can't be exchanged, but are to be.
    """
    heads = Heads(self.axis_name, self.dispatched, query.shape[-2])
    reason = heads.refusal(query, key, value, options)
    if self.is_striped:
      reason = 'striped positions are not in order'
    if self.method == 'heads' and reason is not None:
      raise ValueError(f'method: heads cannot be exchanged: {reason}')
    if self.method != 'ring' and reason is None:
      return heads
    count = lax.axis_size(self.axis_name)
    is_moved = not self.is_striped and Striped.is_useful(
      query, key, options, count
    )
    ring = Ring(self.axis_name, self.dispatched, self.is_striped or is_moved)
    return Striped(self.axis_name, ring) if is_moved else ring

  def forward(self, *checked):
    return self.choose(*checked).forward(*checked)

  def backward(self, *checked_and_more):
    return self.choose(*checked_and_more[:4]).backward(*checked_and_more)


def _choose(names, platform, *checked):
  """Return the first implementation that supports arguments and platform."""
  reasons = []
  for name in names:
    implementation = find(name, platform)
    reason = implementation.refusal(*checked)
    if reason is None:
      return implementation
    reasons.append(f'{name}: {reason}')
  return Unsupported('; '.join(reasons))


def find(name: str, platform: str) -> Implementation:
  """Return the implementation of this name for a platform."""
  by_platform = _IMPLEMENTATIONS[name]
  missing = by_platform.get(None, _Missing(platform))
  return by_platform.get(platform, missing)


def names_of(implementation) -> list[str]:
  """Return the names to try, in order.

  Raises:
    ValueError: a name is unknown, or there is none.
  """
  if implementation is None:
    return list(_DEFAULT)
  names = (
    [implementation]
    if isinstance(implementation, str)
    else list(implementation)
  )
  for name in names:
    if name not in _IMPLEMENTATIONS:
      raise ValueError(
        f'implementation: expected one of {sorted(_IMPLEMENTATIONS)}, '
        f'got {name!r}'
      )
  if not names:
    raise ValueError('implementation: expected at least one name, got none')
  return names
