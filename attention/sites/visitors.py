"""What sites are, and what may happen at them."""

import collections
import dataclasses
from collections.abc import Callable, Iterable

import haiku as hk
import jax
import jax.numpy as jnp

from attention.ops.attention_weights import select

# The axes of heads and of positions, from the end, by kind of site.
KINDS = {
  'query': (-2, -3),
  'key': (-2, -3),
  'value': (-2, -3),
  'pattern': (-3, -2),
  'weighted_value': (-2, -3),
  'gate': (-2, -3),
  'head_output': (-2, -3),
  'block_input': (None, -2),
  'block_output': (None, -2),
  'input': (None, -2),
  'output': (None, -2),
}


@dataclasses.dataclass(frozen=True)
class Site:
  """A place in a module's computation, at one of the module's calls."""

  path: str  # of the module that has it, '#1' for its second call
  kind: str
  number: int  # of the call
  scope: str  # path of the state that holds its leaves
  value: jax.ShapeDtypeStruct  # without stack axes
  stack: tuple[int, ...]  # the layers of `hk.layer_stack`
  is_carried: bool  # AlphaFold's stack, which carries state through its loop

  @property
  def key(self) -> str:
    return f'{self.kind}#{self.number}'


@dataclasses.dataclass(frozen=True)
class Visit:
  """What happens at a site: a function value -> value."""

  function: Callable
  is_edit: bool = False  # whether it returns another value
  is_active: object = True  # whether an edit changes anything; JAX may trace it
  selection: dict | None = None  # arguments that compute a part of a pattern

  def __call__(self, value):
    return self.function(value)


class Visitor:
  """What happens at sites; subclasses say what.

  `carried` is the number of layers of AlphaFold's stack, inside it.
  """

  carried = 0

  def __init__(self, chosen: Iterable[Site] = ()):
    self._calls = collections.Counter()
    self._scopes = {f'/{site.scope}/' for site in chosen}

  def reaches_into(self, module) -> bool:
    """Whether a chosen site may lie inside that module."""
    # Inside `hk.layer_stack`, names are relative to it.
    return any(f'/{module.module_name}/' in scope for scope in self._scopes)

  def at(self, module, kind: str, *, is_part: bool = False):
    """What to do with the value of a site, or None for nothing.

    Called once for each call of a site, in the scope of the state of its
    leaves, so that repeated calls can be counted.

    Args:
      module: the module that computes the value.
      kind: of the site.
      is_part: whether the site belongs to the module above.

    Returns:
      A `Visit`.
    """
    raise NotImplementedError

  def number(self, module, kind: str) -> int | None:
    """The number of this call, or None if no site here is selected."""
    # Looking for state in another module would add an empty entry for it, which
    # loops that carry state refuse.
    name = f'/{module.module_name}/'
    if not any(scope.endswith(name) for scope in self._scopes):
      return None
    calls = read(f'calls:{kind}')
    if calls is None:
      return None
    site = module.module_name, kind
    self._calls[site] += 1
    # A loop may be traced twice.
    return (self._calls[site] - 1) % calls.shape[-1]


def read(name: str):
  """State of the current module, or None."""
  try:
    return hk.get_state(name)
  except ValueError:
    return None


@dataclasses.dataclass(frozen=True)
class Selection:
  """Heads and positions of queries; None for all."""

  heads: object = None
  queries: object = None

  def of_pattern(self, kind):
    """Arguments of a function that computes selected patterns only."""
    return dataclasses.asdict(self) if kind == 'pattern' else None

  def of(self, kind, value):
    """The selected part of a site's value."""
    return (
      value if kind in ('pattern', 'key', 'value') else self.take(kind, value)
    )

  def take(self, kind, value):
    """The heads and queries of a value that has them all."""
    for numbers, name, axis in zip(
      (self.heads, self.queries), ('heads', 'queries'), KINDS[kind], strict=True
    ):
      if numbers is not None and axis is not None:
        chosen = select(name, numbers, value.shape[axis])
        value = jnp.take(value, chosen, axis=axis)
    return value
