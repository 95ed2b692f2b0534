"""One edit at each head or position of each layer, as one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import sites
from attention.edit import Edit, edit
from attention.modules.fields import check_choice

_AXES = ('heads', 'positions')


def sweep(
  function,
  params,
  change: Edit,
  *args,
  over='heads',
  metric=None,
  layers=None,
  batch_size=None,
  rng=None,
  state=None,
  **kwargs,
):
  """The effect of one edit, made at each layer and head (or position) in turn.

  All edits are one program: a loop that runs the function once for each layer
  and head, in the memory of one run. Activation patching is a sweep whose `new`
  was captured from another input (Meng et al. 2022, "Locating and Editing
  Factual Associations in GPT", section 2).

  Args:
    function: as in `attention.edit`.
    params: the parameters of the function.
    change: what to change and to what. Its `new` may be a dict by module path,
      as `attention.capture` returns it. Where it has heads or positions, only
      those are changed; they cannot be the axis of the sweep.
    *args: positional arguments of the function.
    over: 'heads', or 'positions', for one position at a time.
    metric: a function of the output, such as the logit of the right answer; the
      output itself by default.
    layers: paths of the layers, with wildcards or as indices, as in
      `attention.capture`; all that have such a value by default.
    batch_size: edits to compute at once (`jax.vmap`); one by default.
    rng: a `jax.random` key, if the function uses random numbers.
    state: the Haiku state of the function, if any.
    **kwargs: keyword arguments of the function.

  Returns:
    [layers, heads or positions, ...], the metric after each edit, a tree if the
    metric is one. Each layer of a stack is a layer, in order.

  Raises:
    ValueError: as `attention.edit`; an unknown `over`; layers with different
      numbers of heads or positions, or no path of theirs in `new`.
  """
  check_choice('over', over, _AXES)
  if getattr(change, over) is not None:
    raise ValueError(
      f'change: expected {over}=None, over which the sweep goes, got '
      f'{getattr(change, over)!r}'
    )
  init, _ = sites.stateful(function)
  known = sites.discover(init, (change.what,), args, kwargs)[change.what]
  chosen = sites.choose(layers, change.what, known)
  axis = sites.KINDS[change.what][_AXES.index(over)]
  if axis is None:
    raise ValueError(
      f'over: expected positions for {change.what!r}, which has no heads, got '
      f'{over!r}'
    )
  counts = {site.path: site.value.shape[axis] for site in chosen}
  if len({*counts.values()}) > 1:
    raise ValueError(
      f'layers: expected as many {over} in all layers, got {counts}; choose '
      'some by layers'
    )
  count = next(iter(counts.values()))
  edits = [one for site in chosen for one in _edits(site, change)]

  def run(number):
    layer, item = number // count, number % count
    is_item = jnp.arange(count) == item
    given = {
      path: dataclasses.replace(one, **{over: is_item & (layer == i)})
      for i, (path, one) in enumerate(edits)
    }
    output = edit(
      function, params, given, *args, rng=rng, state=state, **kwargs
    )
    return output if metric is None else metric(output)

  results = lax.map(run, jnp.arange(len(edits) * count), batch_size=batch_size)
  return jax.tree.map(
    lambda x: x.reshape(len(edits), count, *x.shape[1:]), results
  )


def _edits(site: sites.Site, change: Edit) -> list[tuple[str, Edit]]:
  """An edit for each layer of the site's stack, or the one of the site."""
  new = change.new
  if isinstance(new, dict):
    if site.path not in new:
      raise ValueError(
        f'change: expected new to have the paths of the layers, got none for '
        f'{site.path!r}'
      )
    new = new[site.path]
  if not site.stack:
    return [(site.path, dataclasses.replace(change, new=new))]
  is_by_layer = not callable(new) and jnp.ndim(new) > len(site.value.shape)
  return [
    (
      site.path + ''.join(f'[{i}]' for i in layer),
      dataclasses.replace(change, new=new[layer] if is_by_layer else new),
    )
    for layer in np.ndindex(site.stack)
  ]
