"""Functions run with visitors, whose leaves are part of their state."""

import collections
import contextlib

import haiku as hk
import numpy as np

from attention.sites.interceptor import Interceptor
from attention.sites.visitors import Site


def leaves_of(sites: dict[str, dict[str, Site]], chosen) -> dict:
  """State that lets a `Visitor` count the calls of the chosen sites."""
  state = collections.defaultdict(dict)
  for site in chosen:
    calls = [
      s.number for s in sites[site.kind].values() if s.scope == site.scope
    ]
    # The axes of a stack come first, and are gone inside it.
    shape = () if site.is_carried else site.stack
    state[site.scope][f'calls:{site.kind}'] = np.zeros(
      (*shape, max(calls) + 1), bool
    )
  return state


def run(visitors, apply, params, state, leaves, rng, args, kwargs):
  """Call `apply` with visitors and their leaves.

  Returns:
    (output, state, state with the visitors' leaves).
  """
  state = state or {}
  given = {path: dict(leaves) for path, leaves in state.items()}
  for path, more in leaves.items():
    given.setdefault(path, {}).update(more)
  intercepted = contextlib.nullcontext()
  if visitors:
    intercepted = hk.intercept_methods(Interceptor(*visitors))
  with intercepted:
    output, after = apply(params, given, rng, *args, **kwargs)
  own = {}
  for path, values in after.items():
    added = leaves.get(path, {})
    if kept := {name: x for name, x in values.items() if name not in added}:
      own[path] = kept
  return output, own, after


def stateful(function):
  """`hk.transform_with_state` of an argument or result of `hk.transform`."""
  if isinstance(function, hk.TransformedWithState):
    return function
  if isinstance(function, hk.Transformed):
    # The apply of hk.transform raises on state, so transform it again.
    function = getattr(function.apply, '_original_fn', None)
    if function is None:
      raise ValueError(
        'function: expected the argument of hk.transform, got its result'
      )
  return hk.transform_with_state(function)
