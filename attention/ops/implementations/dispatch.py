"""The table of implementations, and the choice of one for each platform."""

import dataclasses

from attention.ops.implementations import cudnn, partitioning, reference
from attention.ops.implementations.base import (
  ByPlatform,
  Implementation,
  Partitioned,
  Unsupported,
)
from attention.ops.implementations.chunked import Chunked
from attention.ops.implementations.fused import Tpu, Triton
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
  'fused': {'cuda': Triton(), 'tpu': Tpu()},
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
  names = names_of(implementation)
  *inputs, options = checked
  checked = (*map(partitioning.constrain, inputs), options)
  choices = {
    p: _choose(names, p, *checked) for p in (*PLATFORMS, PARTITIONED_TPUS)
  }
  chosen = set(choices.values())
  if all(isinstance(c, Unsupported) for c in chosen):
    raise NotImplementedError(choices[default_platform()].reason)
  if len(chosen) == 1:
    (only,) = chosen
    return partitioning.constrain(only(*checked))
  by_platform = ByPlatform(
    tuple(
      (p, c if 'tpu' in p else Partitioned(c, Ring)) for p, c in choices.items()
    )
  )
  return partitioning.constrain(by_platform(*checked))


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
