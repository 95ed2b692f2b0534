"""Change what a Haiku function computes on the way."""

import dataclasses
import functools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import sites
from attention.ops.attention_weights import select


@dataclasses.dataclass(frozen=True)
class Edit:
  """A change of one kind of value, for `edit`.

  Attributes:
    what: a name that `capture` lists, such as 'pattern'.
    new: what replaces the value: a number, an array that broadcasts to the
      whole value (not only to the selected heads or positions), or a function
      of the whole value that returns one. 0 ablates. A pattern's rows need not
      sum to 1.
    heads: indices of the heads to change, or booleans, one a head; all by
      default. Those of 'key' and 'value' are key heads.
    positions: indices of the positions to change, or booleans, one a position;
      all by default. They are queries, or keys in 'key' and 'value'.
  """

  what: str
  new: Any = 0.0
  heads: Any = None
  positions: Any = None


def edit(function, params, edits, *args, rng=None, state=None, **kwargs):
  """Run a Haiku function with some of its values replaced.

  The function is not changed: modules, `hk.layer_stack`, `hk.remat` and
  AlphaFold's stack work as in `capture`, and so do `jax.jit`, `jax.grad` and
  `jax.vmap` around it. A module of which a pattern is replaced computes its
  whole pattern, and no dropout of it; others use the implementation that they
  always use.

  Args:
    function: an argument or result of `hk.transform` or
      `hk.transform_with_state`.
    params: the parameters of the function.
    edits: {path: `Edit` or a list of them, made in order}. Paths are those of
      `capture`, where `*` is a wildcard. 'path[3]' is layer 3 of a stack; of
      'path', arrays may have a leading layer axis.
    *args: positional arguments of the function.
    rng: a `jax.random` key, if the function uses random numbers.
    state: the Haiku state of the function, if any.
    **kwargs: keyword arguments of the function.

  Returns:
    What the plain call returns: the output, or, if `function` is a result of
    `hk.transform_with_state`, a pair of the output and the state.

  Raises:
    ValueError: a path, kind, head or position does not exist (the message lists
      those that do), or a new value does not broadcast to the old one.
  """
  init, apply = sites.stateful(function)
  editor = Editor.create(init, edits, args, kwargs)
  output, own, _ = sites.run(
    [editor] if edits else [],
    apply,
    params,
    state,
    editor.leaves,
    rng,
    args,
    kwargs,
  )
  if isinstance(function, hk.TransformedWithState):
    return output, own
  return output


@dataclasses.dataclass(frozen=True)
class _Change:
  """An edit of one site; `layer` is an index in its stack, or None for all."""

  edit: Edit
  site: sites.Site
  layer: tuple[int, ...] | None
  heads: Any  # booleans, None for all
  positions: Any

  @property
  def is_by_layer(self) -> bool:
    """Whether the new value has axes of the stack."""
    is_array = not callable(self.edit.new)
    return is_array and jnp.ndim(self.edit.new) > len(self.site.value.shape)

  def leaves(self, number: int) -> dict:
    """State that says, layer by layer, whether and what to change."""
    stack = self.site.stack
    chosen = np.full(stack, self.layer is None)
    if self.layer is not None:
      chosen[self.layer] = True
    leaves = {f'edit:{number}': chosen}
    if self.is_by_layer:
      leaves[f'new:{number}'] = jnp.broadcast_to(
        self.edit.new, stack + jnp.shape(self.edit.new)[len(stack) :]
      )
    if self.site.is_carried:
      leaves[f'index:{number}'] = jnp.int32(0)
    return leaves

  def where(self):
    """Booleans that broadcast to the value, or None for all of it."""
    where = None
    for chosen, axis in zip(
      (self.heads, self.positions), sites.KINDS[self.site.kind], strict=True
    ):
      if chosen is not None:
        chosen = chosen.reshape(-1, *(1,) * (-1 - axis))
        where = chosen if where is None else where & chosen
    return where


def _place(path: str, one: Edit, known: dict[str, sites.Site]) -> list[_Change]:
  """The changes of an edit: one for each site that its path names."""
  sites.check_any(known, one.what)
  addresses = {}
  for site in known.values():
    addresses[site.path] = site, None
    for layer in np.ndindex(site.stack) if site.stack else ():
      number = ''.join(f'[{i}]' for i in layer)
      addresses[site.path + number] = site, layer
  # A wildcard names stacks as a whole.
  names = list(known) if '*' in path and '[' not in path else list(addresses)
  found = sites.find('edits', path, names)
  return [_check(one, *addresses[name]) for name in found]


def _check(one: Edit, site: sites.Site, layer) -> _Change:
  """Check an edit against the site's value."""
  shape, axes = site.value.shape, sites.KINDS[site.kind]
  where = []
  for name, numbers, axis in zip(
    ('heads', 'positions'), (one.heads, one.positions), axes, strict=True
  ):
    if numbers is not None and axis is None:
      raise ValueError(
        f'{name}: expected None for {one.what!r}, which has no {name}, got '
        f'{numbers!r}'
      )
    where.append(None if numbers is None else _mask(name, numbers, shape[axis]))
  change = _Change(one, site, layer, *where)
  new = one.new
  if callable(new):
    new = jax.eval_shape(new, site.value)
  got = jnp.shape(new)
  inner = got[len(site.stack) :] if change.is_by_layer else got
  stack = got[: len(site.stack)] if change.is_by_layer else ()
  try:
    is_right = np.broadcast_shapes(inner, shape) == shape
    is_right &= np.broadcast_shapes(stack, site.stack) == site.stack
    is_right &= not (change.is_by_layer and layer is not None)
  except ValueError:
    is_right = False
  if not is_right:
    stacked = f', or by layer {(*site.stack, *shape)}' if site.stack else ''
    if layer is not None:
      stacked = ''
    raise ValueError(
      f'new: expected a {one.what} that broadcasts to {shape}{stacked} at '
      f'{site.path!r}, got shape {got}'
    )
  return change


def _mask(name: str, numbers, count: int):
  """Booleans of the chosen indices, of which JAX may trace the numbers."""
  if not isinstance(numbers, jax.core.Tracer):
    numbers = np.asarray(numbers)
  if numbers.dtype == bool:
    if numbers.shape != (count,):
      raise ValueError(
        f'{name}: expected {count} booleans, got shape {numbers.shape}'
      )
    return numbers
  if not isinstance(numbers, jax.core.Tracer):
    numbers = select(name, numbers, count)
  return (numbers.reshape(-1, 1) == np.arange(count)).any(0)


class Editor(sites.Visitor):
  """Changes the values of sites.

  Attributes:
    leaves: state that the function is to be given.
  """

  @classmethod
  def create(cls, init, edits: dict, args, kwargs) -> 'Editor':
    """The edits of `edit`, checked against a call of the function.

    Args:
      init: of `hk.transform_with_state`.
      edits: as in `edit`.
      args: positional arguments of the function.
      kwargs: keyword arguments of the function.

    Raises:
      ValueError: as `edit`.
    """
    listed = [
      (path, one)
      for path, given in edits.items()
      for one in (given if isinstance(given, list | tuple) else [given])
    ]
    kinds = tuple(dict.fromkeys(one.what for _, one in listed))
    known = sites.discover(init, kinds, args, kwargs) if kinds else {}
    return cls(
      known,
      [
        change
        for path, one in listed
        for change in _place(path, one, known[one.what])
      ],
    )

  def __init__(self, known, placed: list[_Change]):
    super().__init__(change.site for change in placed)
    self._placed = placed
    self.leaves = sites.leaves_of(known, [change.site for change in placed])
    for number, change in enumerate(placed):
      self.leaves[change.site.scope].update(change.leaves(number))

  def at(self, module, kind, *, is_part=False):
    call = self.number(module, kind)
    if call is None:
      return None
    found = []
    for number, change in enumerate(self._placed):
      if (change.site.kind, change.site.number) != (kind, call):
        continue
      chosen = sites.read(f'edit:{number}')
      if chosen is None:
        continue
      new = change.edit.new
      if change.is_by_layer:
        new = sites.read(f'new:{number}')
      if self.carried:
        layer = sites.read(f'index:{number}')
        hk.set_state(f'index:{number}', layer + 1)
        chosen = chosen[layer % self.carried]
        new = new[layer % self.carried] if change.is_by_layer else new
      found.append((chosen, new, change.where()))
    if not found:
      return None
    return sites.Visit(
      functools.partial(_apply, found), is_edit=True, is_active=_is_any(found)
    )


def _is_any(changes):
  """Whether any change is made; an array if JAX traces the choice."""
  made = [
    chosen if where is None else chosen & where.any()
    for chosen, _, where in changes
  ]
  if any(isinstance(one, jax.core.Tracer) for one in made):
    return jnp.stack([jnp.asarray(one) for one in made]).any()
  return any(bool(one) for one in made)


def _apply(changes, value):
  """Make changes (whether, new value, where), in order."""
  for chosen, new, where in changes:
    new = new(value) if callable(new) else new
    new = jnp.broadcast_to(jnp.asarray(new, value.dtype), value.shape)
    chosen = chosen if where is None else chosen & where
    if isinstance(chosen, jax.core.Tracer) or not np.all(chosen):
      new = jnp.where(chosen, new, value)
    value = new
  return value
