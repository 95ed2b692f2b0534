"""The table of implementations, and the choice of one for each platform."""

import dataclasses

from attention.ops.implementations import cudnn, reference
from attention.ops.implementations.base import (
  ByPlatform,
  Cut,
  Implementation,
  Refused,
)
from attention.ops.implementations.chunked import Chunked
from attention.ops.implementations.fused import Tpu, Triton
from attention.ops.platforms import (
  CUT_FOR_TPUS,
  PLATFORMS,
  default_platform,
)


@dataclasses.dataclass(frozen=True)
class _Missing(Implementation):
  """No implementation of that name exists for the platform."""

  platform: str

  def refusal(self, *_):
    return f'no kernel for platform {self.platform!r}'


# Best first: the implementation of each platform; None stands for the others.
_IMPLEMENTATIONS = {
  'fused': {'cuda': Triton(), 'tpu': Tpu()},
  'chunked': {'cpu': Chunked(), None: Chunked(is_cpu=False)},
  'reference': {None: reference.Reference()},
  'cudnn': {'cuda': cudnn.Cudnn()},
}
_DEFAULT = ('fused', 'chunked', 'reference')


def dispatch(implementation, *checked):
  """Runs the implementation chosen for each platform.

  Args:
    implementation: as in `dot_product_attention`.
    *checked: query, key, value and `Options`.

  Returns:
    [*b, q, h, e].

  Raises:
    NotImplementedError: no platform has an implementation for these arguments.
  """
  names = names_of(implementation)
  choices = {p: _choose(names, p, *checked) for p in (*PLATFORMS, CUT_FOR_TPUS)}
  chosen = set(choices.values())
  if all(isinstance(c, Refused) for c in chosen):
    raise NotImplementedError(choices[default_platform()].reason)
  if len(chosen) == 1:
    (only,) = chosen
    return only(*checked)
  return ByPlatform(
    tuple((p, c if 'tpu' in p else Cut(c)) for p, c in choices.items())
  )(*checked)


def _choose(names, platform, *checked):
  """The first implementation that can compute the call on the platform."""
  reasons = []
  for name in names:
    implementation = find(name, platform)
    reason = implementation.refusal(*checked)
    if reason is None:
      return implementation
    reasons.append(f'{name}: {reason}')
  return Refused('; '.join(reasons))


def find(name: str, platform: str) -> Implementation:
  """The implementation of that name for a platform."""
  by_platform = _IMPLEMENTATIONS[name]
  missing = by_platform.get(None, _Missing(platform))
  return by_platform.get(platform, missing)


def names_of(implementation) -> list[str]:
  """Names to try, in order; raises ValueError for an unknown one."""
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
