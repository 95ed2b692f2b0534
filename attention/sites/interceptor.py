"""Finds the sites of modules while a function runs."""

import dataclasses
import functools

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.evoformer.axial_attention import AxialAttention
from attention.modules.gated import GatedAttention, GlobalAttention
from attention.modules.layers import Stream
from attention.modules.multihead import MultiHeadAttention
from attention.ops.attention_weights import attention_weights, weighted_values
from attention.sites.visitors import Selection, Visit, Visitor

_STREAM = {'before': 'block_input', 'after': 'block_output'}


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

    visit = self._at(module, 'head_output', is_part=True)
    if visit is None:
      return call(_join(heads), **arguments)
    # Of all heads, of none and of each alone. One call, as Haiku runs further
    # interceptors (low-rank updates) in the first call only.
    one = jnp.eye(num_heads, dtype=heads.dtype)
    alone = jnp.einsum('...hc,hg->h...gc', heads, one)
    rows = jnp.concatenate([heads[None], jnp.zeros_like(heads)[None], alone])
    output, bias, *shares = call(_join(rows), **arguments)
    exact = jnp.stack(shares, axis=-2).astype(jnp.float32)
    exact = exact - bias[..., None, :].astype(jnp.float32)
    shares = visit(exact.astype(output.dtype))
    if not visit.is_edit:
      return output
    return jnp.where(visit.is_active, _sum(shares) + bias, output)

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
