"""The sites of a function: which there are, and those that are chosen."""

import difflib
import fnmatch

import haiku as hk
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from attention.sites.interceptor import Interceptor
from attention.sites.visitors import (
  KINDS,
  Selection,
  Site,
  Visit,
  Visitor,
  read,
)

_OF_ATTENTION, _OF_BLOCKS = list(KINDS)[:7], list(KINDS)[7:9]
_MAX_LISTED = 12  # paths in an error message


class _Discover(Visitor):
  """Stores every site's value in state, at `init`."""

  def __init__(self, kinds, selection):
    super().__init__()
    self._kinds, self._selection = kinds, selection
    self._traces = {}  # in which a call was first seen
    self._count = 0

  def reaches_into(self, module):
    return True

  def at(self, module, kind, *, is_part=False):
    if kind not in self._kinds or not hk.running_init():
      return None
    above = '^' if is_part else ''

    def store(value):
      chosen = self._selection.of(kind, value)
      number = 0
      while read(f'site:{above}{kind}#{number}') is not None:
        trace = self._traces.get((module.module_name, kind, number))
        if trace == self.outermost != get_opaque_trace_state():
          return value  # the same call, in a loop that is unrolled once
        number += 1
      name = f'{above}{kind}#{number}'
      stack = (self.carried,) if self.carried else ()
      hk.set_state(
        f'site:{name}', jnp.zeros(stack + chosen.shape, chosen.dtype)
      )
      trace = get_opaque_trace_state()
      self._traces[module.module_name, kind, number] = trace
      how = 'carried' if self.carried else 'nested'
      # A shape that tells the axes of stacks, the rank and the order.
      self._count += 1
      facts = jnp.zeros((*stack, chosen.ndim, self._count))
      hk.set_state(f'{how}:{name}', facts)
      return value

    return Visit(store, selection=self._selection.of_pattern(kind))


def discover(
  init, kinds, args, kwargs, selection=None
) -> dict[str, dict[str, Site]]:
  """The sites of a function, by kind and path.

  Args:
    init: of `hk.transform_with_state`.
    kinds: names in `KINDS`.
    args: positional arguments of the function.
    kwargs: keyword arguments of the function.
    selection: a `Selection`; all heads and queries by default.

  Raises:
    ValueError: an unknown kind, or a head or query that does not exist.
  """
  selection = selection or Selection()
  for kind in kinds:
    if kind not in KINDS:
      raise ValueError(
        f'what: expected one of {", ".join(KINDS)}, got {kind!r}'
      )
  visitor = _Discover(kinds, selection)

  def run():
    visitor.outermost = get_opaque_trace_state()
    return init(jax.random.key(0), *args, **kwargs)

  with hk.intercept_methods(Interceptor(visitor)):
    _, state = jax.eval_shape(run)
  found = []
  for scope, leaves in state.items():
    for name, leaf in leaves.items():
      label = name.removeprefix('site:')
      if label == name:
        continue
      is_carried = f'carried:{label}' in leaves
      facts = leaves[f'carried:{label}' if is_carried else f'nested:{label}']
      *stack, rank, order = facts.shape
      kind, _, number = label.removeprefix('^').partition('#')
      path = scope
      if label.startswith('^') or path.endswith('/stream'):
        path = path.rpartition('/')[0]
      if int(number):
        path = f'{path}#{number}'
      shape = leaf.shape[len(leaf.shape) - rank :]
      value = jax.ShapeDtypeStruct(shape, leaf.dtype)
      site = Site(
        path, kind, int(number), scope, value, tuple(stack), is_carried
      )
      found.append((order, site))
  found = [site for _, site in sorted(found, key=lambda item: item[0])]
  return {
    kind: {site.path: site for site in found if site.kind == kind}
    for kind in kinds
  }


def check_any(known: dict[str, Site], kind: str) -> None:
  """Raises ValueError if a function has no sites of that kind."""
  if known:
    return
  calls, supported = 'module call', 'any module with array arguments'
  if kind in _OF_ATTENTION:
    calls = 'gated attention call' if kind == 'gate' else 'attention call'
    supported = (
      'MultiHeadAttention, GatedAttention, GlobalAttention and '
      'hk.MultiHeadAttention'
    )
  elif kind in _OF_BLOCKS:
    calls, supported = 'block', 'TransformerBlock and the Evoformer'
  raise ValueError(
    f'function: expected at least one {calls} for {kind!r}, got none; '
    f'supported are {supported}'
  )


def choose(layers, kind: str, known: dict[str, Site]) -> list[Site]:
  """The sites of the given layers: paths, wildcards, indices, or None for all.

  Raises:
    ValueError: there are none; the message lists those there are.
  """
  check_any(known, kind)
  if layers is None:
    return list(known.values())
  found = set()
  for layer in [layers] if isinstance(layers, str | int) else layers:
    found.update(find('layers', layer, list(known)))
  return [site for path, site in known.items() if path in found]


def find(name: str, wanted, available: list[str]) -> list[str]:
  """Paths that an index, a path or a pattern with `*` names.

  Raises:
    ValueError: there is none; the message lists those there are.
  """
  if isinstance(wanted, str):
    exact = [path for path in available if path == wanted]
    # Brackets number the layers of a stack, in names of sites.
    found = exact or fnmatch.filter(available, wanted.replace('[', '[[]'))
  else:
    found = available[wanted : wanted + 1] if wanted >= 0 else []
  if not found:
    shown = list(enumerate(available))
    if len(available) > _MAX_LISTED:
      near = difflib.get_close_matches(str(wanted), available, 3, 0) or []
      shown = [(i, path) for i, path in shown if path in near]
    known = ', '.join(f'{i}: {path}' for i, path in shown)
    if len(available) > _MAX_LISTED:
      known = f'{len(available)} paths such as {known}'
    raise ValueError(f'{name}: expected one of {known}, got {wanted!r}')
  return found
