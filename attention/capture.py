"""Attention's patterns out of any Haiku function, which is left as it is."""

import fnmatch

import haiku as hk
import jax
import jax.numpy as jnp

from attention.ops.attention_weights import attention_weights

# Patterns leave the function as Haiku state of this name: the only way out of
# `hk.layer_stack` and `hk.remat`, and the paths come with it.
_STATE = 'captured_pattern'


def capture(
  function,
  params,
  *args,
  layers=None,
  heads=None,
  queries=None,
  rng=None,
  state=None,
  **kwargs,
):
  """Runs a Haiku function, and returns its attention patterns too.

  They are those of `MultiHeadAttention`, `GatedAttention`,
  `hk.MultiHeadAttention`, and of any module with the methods `attend` and
  `pattern` of `MultiHeadAttention`. They are computed anew from queries and
  keys, whichever implementation ran, without dropout; only what is asked for
  is computed. It works under `jax.jit`, in which a large model belongs.

  Args:
    function: what `hk.transform` or `hk.transform_with_state` was given or
      has returned.
    params: its parameters.
    *args: what it is called with.
    layers: paths of modules as they stand in the result, with `*` for
      anything, or their numbers there; one or more; all by default.
    heads: numbers of the heads wanted; all by default.
    queries: positions of the queries wanted; all by default.
    rng: a key of `jax.random`, if the function draws random numbers.
    state: its Haiku state, if it has any.
    **kwargs: what it is called with.

  Returns:
    (output, patterns): what the plain call returns, and a dict of float32
    arrays [*b, heads, queries, k] by module path. Patterns of a module in
    `hk.layer_stack` have the layers as first axis. The second call of one
    module is at 'path#1', and so on. Rows sum to 1; to less with sinks; to 0
    where a query may see no key (`hk.MultiHeadAttention` spreads such a row
    evenly over all keys).

  Raises:
    ValueError: a layer, head or query that isn't there (says what is), or a
      function without attention.
  """
  apply = _find_apply(function)

  def run(recorder):
    with hk.intercept_methods(recorder):
      output, after = apply(params, state or {}, rng, *args, **kwargs)
    return output, {
      path + name.removeprefix(_STATE): leaf
      for path, leaves in after.items()
      for name, leaf in leaves.items()
      if name.startswith(_STATE)
    }

  chosen = None
  if layers is not None:
    there = []
    jax.eval_shape(lambda: there.extend(run(_Recorder())[1]))
    chosen = _choose(layers, there)
  recorder = _Recorder(chosen, heads, queries)
  output, patterns = run(recorder)
  if not recorder.has_seen_attention:
    raise ValueError(
      'function: no attention in it; capture sees MultiHeadAttention, '
      'GatedAttention and hk.MultiHeadAttention'
    )
  if chosen is not None:
    patterns = {path: patterns[path] for path in chosen}
  return output, patterns


def _find_apply(function):
  """(params, state, rng, *args, **kwargs) -> (output, state)."""
  if isinstance(function, hk.TransformedWithState):
    return function.apply
  if isinstance(function, hk.Transformed):
    # Its own apply refuses state.
    function = getattr(function.apply, '_original_fn', None)
    if function is None:
      raise ValueError(
        'function: expected the function that hk.transform was given, got '
        'what it returned'
      )
  return hk.transform_with_state(function).apply


def _choose(layers, there):
  """Paths among `there`, of paths, patterns of paths, or numbers."""
  if not there:
    return []
  chosen = []
  for layer in [layers] if isinstance(layers, (str, int)) else layers:
    if isinstance(layer, str):
      found = [p for p in there if p == layer] or fnmatch.filter(there, layer)
    else:
      found = there[layer : layer + 1] if layer >= 0 else []
    if not found:
      known = ', '.join(f'{i}: {path}' for i, path in enumerate(there))
      raise ValueError(f'layers: no {layer!r}; there are {known}')
    chosen += [path for path in found if path not in chosen]
  return [path for path in there if path in chosen]


class _Recorder:
  """An interceptor that puts each pattern into its module's state."""

  def __init__(self, chosen=None, heads=None, queries=None):
    self.has_seen_attention = False
    self._chosen = chosen
    self._selection = {'heads': heads, 'queries': queries}
    self._open = []  # (module, outputs of its linear layers) being called

  def __call__(self, call, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, hk.Linear) and method == '__call__':
      output = call(*args, **kwargs)
      if self._open:
        self._open[-1][1][module.name] = output
      return output
    if getattr(module, 'remat', False):
      # Patterns could not leave loops that compute anew what is in them.
      module.remat = False
    is_haikus = isinstance(module, hk.MultiHeadAttention)
    is_attention = (is_haikus and method == '__call__') or (
      method == 'attend' and hasattr(module, 'pattern')
    )
    # A subclass may call its parent's method of that name.
    is_inner = any(module is outer for outer, _ in self._open)
    if not is_attention or is_inner:
      return call(*args, **kwargs)

    self.has_seen_attention = True
    linears = {}
    self._open.append((module, linears))
    try:
      output = call(*args, **kwargs)
    finally:
      self._open.pop()
    if self._is_wanted(module.module_name):
      if is_haikus:
        pattern = self._haiku_pattern(module, linears, *args, **kwargs)
      else:
        pattern = self._pattern(module, *args, **kwargs)
      _store(pattern)
    return output

  def _is_wanted(self, path):
    """Inside `hk.layer_stack` a path lacks what the stack puts before it."""
    return self._chosen is None or any(
      f'/{full.split("#")[0]}'.endswith(f'/{path}') for full in self._chosen
    )

  def _pattern(self, module, query, key, value, *, is_training=False, **where):
    del value, is_training
    return module.pattern(query, key, **where, **self._selection)

  def _haiku_pattern(self, module, linears, query, key, value, mask=None):
    del query, key, value
    split = [
      x.reshape(*x.shape[:-1], module.num_heads, module.key_size)
      for x in (linears['query'], linears['key'])
    ]
    if mask is not None:
      mask = jnp.asarray(mask).astype(bool)
    return attention_weights(*split, mask=mask, **self._selection)


def _store(pattern):
  """Into the current module's state, under a name not yet taken."""
  name, number = _STATE, 0
  while True:
    try:
      hk.get_state(name)
    except ValueError:
      break
    number += 1
    name = f'{_STATE}#{number}'
  hk.set_state(name, pattern)
