"""The sites of a Haiku model: places that `capture` reads and `edit` changes.

Values leave and enter a model as Haiku state, the only thing that passes
through `hk.layer_stack`, `hk.remat` and Haiku's loops, and that carries module
paths. `discover` runs the model's `init` abstractly with one state leaf per
site. The leaves of the selected sites are then part of the state that `apply`
is given.
"""

import collections
import dataclasses
import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention.modules.evoformer.layers import AxialAttention
from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.layers import Stream
from attention.modules.multihead import MultiHeadAttention
from attention.ops.attention_weights import (
  attention_weights,
  select,
  weighted_values,
)

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
_OF_ATTENTION = list(KINDS)[:7]
_MAX_LISTED = 12  # paths in an error message
_STREAM = {'before': 'block_input', 'after': 'block_output'}


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


class Interceptor:
  """Finds the sites while a function runs, for `hk.intercept_methods`."""

  def __init__(self, *visitors: Visitor):
    self._visitors = visitors
    self._carried = 0  # layers of AlphaFold's stack, inside it
    self._running = []  # (module, method) of the active calls
    self._attentions = []  # active calls of attention modules

  def __call__(self, call, args, kwargs, context):
    module, method = context.module, context.method_name
    if any(module is m and method == name for m, name in self._running):
      return call(*args, **kwargs)  # the parent's method, called by a subclass
    handle = self._handler(module, method)
    if handle is None:
      return call(*args, **kwargs)
    self._running.append((module, method))
    try:
      return handle(call, module, *args, **kwargs)
    finally:
      self._running.pop()

  def _handler(self, module, method):
    if isinstance(module, Stream):
      return functools.partial(self._result, _STREAM.get(method))
    if method == 'attend' and hasattr(module, 'pattern'):
      return self._attend
    if isinstance(module, GatedAttention | GlobalAttention):
      if method == 'gate':
        return functools.partial(self._result, 'gate')
      if method == 'project':
        return self._project
    return self._module if method == '__call__' else None

  def _module(self, call, module, *args, **kwargs):
    """The call of any module."""
    if isinstance(module, AxialAttention):
      # Values cannot leave its loops over rows.
      module.remat &= not any(v.reaches_into(module) for v in self._visitors)
    if hasattr(module, 'use_scan'):
      module.use_scan = False  # each layer has a path then
    if isinstance(module, hk.Linear):
      call = functools.partial(self._linear, call, module)
    if args and _is_array(args[0]):
      args = (self._visit(module, 'input', args[0]), *args[1:])
    outer = self._carried
    is_attention = isinstance(
      module, MultiHeadAttention | hk.MultiHeadAttention
    )
    if is_attention:
      self._attentions.append(_Attention(module, args, kwargs))
    if hasattr(module, '_count') and hasattr(module, '_call_wrapped'):
      self._carried = max(1, outer) * module._count
    try:
      result = call(*args, **kwargs)
    finally:
      self._carried = outer
      if is_attention:
        self._attentions.pop()
    if type(result) is tuple and result:
      first, *rest = result
    else:
      first, rest = result, None
    if _is_array(first):
      first = self._visit(module, 'output', first)
    return first if rest is None else (first, *rest)

  def _visit(self, module, kind, value, **where):
    visit = self._at(module, kind, **where)
    return value if visit is None else visit(value)

  def _at(self, module, kind, **where) -> Visit | None:
    """What the visitors do at a site, one after the other."""
    visits = []
    for visitor in self._visitors:
      visitor.carried = self._carried
      visits.append(visitor.at(module, kind, **where))
    visits = [visit for visit in visits if visit is not None]
    if len(visits) < 2:
      return visits[0] if visits else None
    edited, recorded = visits

    def both(value):
      value = edited(value)
      selection = Selection(**(recorded.selection or {}))
      recorded(selection.take(kind, value))
      return value

    return Visit(both, is_edit=True)

  def _visit_lazily(self, module, kind, plain, compute, use, **where):
    """A site whose value the plain computation does not need.

    Args:
      module: as in `Visitor.at`.
      kind: as in `Visitor.at`.
      plain: a function () -> result.
      compute: a function (**selection) -> value.
      use: a function value -> result.
      **where: as in `Visitor.at`.
    """
    visit = self._at(module, kind, **where)
    if visit is None:
      return plain()
    if not visit.is_edit:
      visit(compute(visit.selection or {}))
      return plain()

    def edited():
      return use(visit(compute({})))

    if isinstance(visit.is_active, jax.core.Tracer):
      return hk.cond(visit.is_active, edited, plain)
    return edited() if visit.is_active else plain()

  def _result(self, kind, call, module, *args, **kwargs):
    value = call(*args, **kwargs)
    return value if kind is None else self._visit(module, kind, value)

  def _attend(self, call, module, query, key, value, **arguments):
    """`MultiHeadAttention.attend`, or that of `GatedAttention`."""
    query = self._visit(module, 'query', query)
    key = self._visit(module, 'key', key)
    value = self._visit(module, 'value', value)
    where = {n: x for n, x in arguments.items() if n != 'is_training'}
    heads = self._visit_lazily(
      module,
      'pattern',
      lambda: call(query, key, value, **arguments),
      lambda selection: module.pattern(query, key, **where, **selection),
      lambda pattern: weighted_values(pattern, value).astype(query.dtype),
    )
    heads = self._visit(module, 'weighted_value', heads)
    if getattr(module, 'value_factorisation', None) == 'full':
      heads = self._visit(module, 'head_output', heads)
    return heads

  def _project(self, call, module, weights, values):
    """The output projection of `GatedAttention`."""
    return self._visit_lazily(
      module,
      'head_output',
      lambda: call(weights, values),
      lambda _: jnp.einsum('...hc,hco->...ho', values, weights['output_w']),
      lambda shares: _sum(shares) + weights['output_b'],
    )

  def _linear(self, call, module, x, **arguments):
    """A linear layer, which may be a projection of an attention module."""
    outer = self._attentions[-1] if self._attentions else None
    if outer is None or not outer.has(module):
      return call(x, **arguments)
    num_heads = outer.module.num_heads
    is_haiku = isinstance(outer.module, hk.MultiHeadAttention)
    if module.name in ('query', 'key', 'value') and is_haiku:
      value = _split(call(x, **arguments), num_heads)
      value = self._visit(module, module.name, value, is_part=True)
      outer.projected[module.name] = value
      return _join(value)
    if module.name != 'linear':
      return call(x, **arguments)
    heads = _split(x, num_heads)
    if is_haiku:
      heads = self._haiku_heads(module, heads, outer)

    def shares(_):
      one = jnp.eye(num_heads, dtype=heads.dtype)
      alone = jnp.einsum('...hc,hg->h...gc', heads, one)
      with_bias, module.with_bias = module.with_bias, False
      value = call(_join(alone), **arguments)
      module.with_bias = with_bias
      return jnp.moveaxis(value, 0, -2)

    def sum_of(shares):
      bias = call(jnp.zeros_like(x), **arguments)
      return _sum(shares) + bias

    return self._visit_lazily(
      module,
      'head_output',
      lambda: call(_join(heads), **arguments),
      shares,
      sum_of,
      is_part=True,
    )

  def _haiku_heads(self, module, heads, outer):
    """The weighted values of `hk.MultiHeadAttention`."""
    query, key, value = (outer.projected[n] for n in ('query', 'key', 'value'))
    mask = outer.mask()
    heads = self._visit_lazily(
      module,
      'pattern',
      lambda: heads,
      lambda selection: attention_weights(query, key, mask=mask, **selection),
      lambda pattern: weighted_values(pattern, value).astype(heads.dtype),
      is_part=True,
    )
    return self._visit(module, 'weighted_value', heads, is_part=True)


@dataclasses.dataclass(frozen=True)
class _Attention:
  """An active call of an attention module with linear layers."""

  module: hk.Module
  args: tuple
  kwargs: dict
  # By name, in `hk.MultiHeadAttention`.
  projected: dict = dataclasses.field(default_factory=dict)

  def has(self, linear) -> bool:
    return linear.module_name == f'{self.module.module_name}/{linear.name}'

  def mask(self):
    """The mask of `hk.MultiHeadAttention`, as booleans."""
    mask = self.kwargs.get('mask', (*self.args, None, None, None, None)[3])
    return None if mask is None else jnp.asarray(mask).astype(bool)


def _split(x, num_heads):
  return x.reshape(*x.shape[:-1], num_heads, -1)


def _join(heads):
  return heads.reshape(*heads.shape[:-2], -1)


def _sum(shares):
  """[..., h, m] → [..., m], added in float32."""
  return shares.sum(-2, dtype=jnp.float32).astype(shares.dtype)


def _is_array(x):
  return isinstance(x, jax.Array) and x.ndim > 1


def read(name: str):
  """State of the current module, or None."""
  try:
    return hk.get_state(name)
  except ValueError:
    return None


class _Discover(Visitor):
  """Stores every site's value in state, at `init`."""

  def __init__(self, kinds, selection):
    super().__init__()
    self._kinds, self._selection = kinds, selection
    self._stored = {}
    self._count = 0

  def reaches_into(self, module):
    return True

  def at(self, module, kind, *, is_part=False):
    if kind not in self._kinds or not hk.running_init():
      return None
    above = '^' if is_part else ''

    def store(value):
      chosen = self._selection.of(kind, value)
      # The number of the call: a leaf that is not what was stored for it comes
      # from outside of a loop, which Haiku runs once before it.
      number = 0
      while (leaf := read(f'site:{above}{kind}#{number}')) is not None:
        if self._stored.get((module.module_name, kind, number)) is not leaf:
          break
        number += 1
      name = f'{above}{kind}#{number}'
      stack = (self.carried,) if self.carried else ()
      leaf = jnp.zeros(stack + chosen.shape, chosen.dtype)
      self._stored[module.module_name, kind, number] = leaf
      hk.set_state(f'site:{name}', leaf)
      how = 'carried' if self.carried else 'nested'
      # A shape that tells the axes of stacks, the rank and the order.
      self._count += 1
      facts = jnp.zeros((*stack, chosen.ndim, self._count))
      hk.set_state(f'{how}:{name}', facts)
      return value

    return Visit(store, selection=self._selection.of_pattern(kind))


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


def discover(
  init, kinds, args, kwargs, selection=Selection()
) -> dict[str, dict[str, Site]]:
  """The sites of a function, by kind and path.

  Args:
    init: of `hk.transform_with_state`.
    kinds: names in `KINDS`.
    args: positional arguments of the function.
    kwargs: keyword arguments of the function.
    selection: a `Selection`, of heads and queries.

  Raises:
    ValueError: an unknown kind, or a head or query that does not exist.
  """
  for kind in kinds:
    if kind not in KINDS:
      raise ValueError(
        f'what: expected one of {", ".join(KINDS)}, got {kind!r}'
      )
  with hk.intercept_methods(Interceptor(_Discover(kinds, selection))):
    _, state = jax.eval_shape(lambda: init(jax.random.key(0), *args, **kwargs))
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
  elif kind in _STREAM.values():
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
  with hk.intercept_methods(Interceptor(*visitors)):
    output, after = apply(params, given, rng, *args, **kwargs)
  own = {
    path: {n: x for n, x in leaves.items() if n in state[path]}
    for path, leaves in after.items()
    if path in state
  }
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
