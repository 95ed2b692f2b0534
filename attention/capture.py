"""Capture attention patterns from any Haiku function, without changing it."""

import fnmatch

import haiku as hk
import jax
import jax.numpy as jnp

from attention.ops.attention_weights import attention_weights

# Patterns are returned as Haiku state of this name. Only state can leave
# `hk.layer_stack` and `hk.remat`, and it carries the module paths.
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
  """Run a Haiku function and return its output and attention patterns.

  Patterns are captured from `MultiHeadAttention`, `GatedAttention`,
  `hk.MultiHeadAttention`, and any module that implements the methods `attend`
  and `pattern` of `MultiHeadAttention`. They are recomputed from queries and
  keys without dropout, independently of the implementation that ran. Only the
  selected patterns are computed. Use `jax.jit` for large models.

  Args:
    function: an argument or result of `hk.transform` or
      `hk.transform_with_state`.
    params: the parameters of the function.
    *args: positional arguments of the function.
    layers: one or more module paths, as in the result, where `*` is a wildcard,
      or their indices in the result; all by default.
    heads: indices of the heads to return; all by default.
    queries: positions of the queries to return; all by default.
    rng: a `jax.random` key, if the function uses random numbers.
    state: the Haiku state of the function, if any.
    **kwargs: keyword arguments of the function.

  Returns:
    (output, patterns): the output of the plain call, and a dict from module
    path to float32 array [*b, heads, queries, k]. Patterns of a module in
    `hk.layer_stack` have a leading layer axis. The second call of a module is
    at 'path#1', and so on. Rows sum to 1, or to less with sinks. Fully masked
    rows are 0, except that `hk.MultiHeadAttention` gives them uniform weights.

  Raises:
    ValueError: If a layer, head or query does not exist (the message lists
      those that do), or if the function calls no attention.
  """
  apply = _stateful_apply(function)

  def run(recorder):
    with hk.intercept_methods(recorder):
      output, after = apply(params, state or {}, rng, *args, **kwargs)
    return output, {
      path + name.removeprefix(_STATE): leaf
      for path, leaves in after.items()
      for name, leaf in leaves.items()
      if name.startswith(_STATE)
    }

  selected = None
  if layers is not None:
    available = []
    jax.eval_shape(lambda: available.extend(run(_Recorder())[1]))
    selected = _select_layers(layers, available)
  recorder = _Recorder(selected, heads, queries)
  output, patterns = run(recorder)
  if not recorder.found_attention:
    raise ValueError(
      'function: expected at least one attention call, got none; capture '
      'supports MultiHeadAttention, GatedAttention and hk.MultiHeadAttention'
    )
  if selected is not None:
    patterns = {path: patterns[path] for path in selected}
  return output, patterns


def _stateful_apply(function):
  """(params, state, rng, *args, **kwargs) -> (output, state)."""
  if isinstance(function, hk.TransformedWithState):
    return function.apply
  if isinstance(function, hk.Transformed):
    # The apply of hk.transform raises on state, so transform it again.
    function = getattr(function.apply, '_original_fn', None)
    if function is None:
      raise ValueError(
        'function: expected the argument of hk.transform, got its result'
      )
  return hk.transform_with_state(function).apply


def _select_layers(layers, available):
  """Resolve paths, wildcards or indices to paths in `available`."""
  if not available:
    return []
  selected = []
  for layer in [layers] if isinstance(layers, (str, int)) else layers:
    if isinstance(layer, str):
      exact = [path for path in available if path == layer]
      found = exact or fnmatch.filter(available, layer)
    else:
      found = available[layer : layer + 1] if layer >= 0 else []
    if not found:
      known = ', '.join(f'{i}: {path}' for i, path in enumerate(available))
      raise ValueError(f'layers: expected one of {known}, got {layer!r}')
    selected += [path for path in found if path not in selected]
  return [path for path in available if path in selected]


class _Recorder:
  """An interceptor that stores each pattern in its module's state."""

  def __init__(self, selected=None, heads=None, queries=None):
    self.found_attention = False
    self._selected = selected
    self._selection = {'heads': heads, 'queries': queries}
    self._active = []  # active calls: (module, outputs of its linear layers)

  def __call__(self, call, args, kwargs, context):
    module, method = context.module, context.method_name
    if isinstance(module, hk.Linear) and method == '__call__':
      output = call(*args, **kwargs)
      if self._active:
        self._active[-1][1][module.name] = output
      return output
    if getattr(module, 'remat', False):
      # Patterns cannot leave the rematerialised loops of such a module.
      module.remat = False
    is_haiku = isinstance(module, hk.MultiHeadAttention)
    is_attention = (is_haiku and method == '__call__') or (
      method == 'attend' and hasattr(module, 'pattern')
    )
    # A subclass may call its parent's method of the same name.
    is_inner = any(module is outer for outer, _ in self._active)
    if not is_attention or is_inner:
      return call(*args, **kwargs)

    self.found_attention = True
    linears = {}
    self._active.append((module, linears))
    try:
      output = call(*args, **kwargs)
    finally:
      self._active.pop()
    if self._is_selected(module.module_name):
      if is_haiku:
        pattern = self._haiku_pattern(module, linears, *args, **kwargs)
      else:
        pattern = self._pattern(module, *args, **kwargs)
      _store(pattern)
    return output

  def _is_selected(self, path):
    """Match path suffixes: `hk.layer_stack` adds its prefix only later."""
    return self._selected is None or any(
      f'/{full.split("#")[0]}'.endswith(f'/{path}') for full in self._selected
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
  """Store the pattern in the current module's state, under an unused name."""
  name, number = _STATE, 0
  while True:
    try:
      hk.get_state(name)
    except ValueError:
      break
    number += 1
    name = f'{_STATE}#{number}'
  hk.set_state(name, pattern)
