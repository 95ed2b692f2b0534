"""Capture what a Haiku function computes on the way, without changing it."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import sites
from attention.edit import Editor


def capture(
  function,
  params,
  *args,
  what='pattern',
  layers=None,
  heads=None,
  queries=None,
  edits=None,
  rng=None,
  state=None,
  **kwargs,
):
  """Run a Haiku function and return its output and intermediate values.

  `what` is one of these, or a tuple of them:

  - 'pattern': attention weights [*b, h, q, k], float32. They are recomputed
    from queries and keys without dropout, independently of the implementation
    that ran. Rows sum to 1, or to less with sinks. Fully masked rows are 0,
    except that `hk.MultiHeadAttention` gives them uniform weights.
  - 'query' [*b, q, h, d], 'key' [*b, k, g, d] and 'value' [*b, k, g, e], as
    they enter attention.
  - 'weighted_value' [*b, q, h, e]: what each head computes.
  - 'gate' [*b, q, h, e]: what scales it in gated attention.
  - 'head_output' [*b, q, h, m]: each head's share of the module's output, after
    the output projection. The shares and that projection's bias sum to the
    output.
  - 'block_input' and 'block_output' [*b, t, m]: the residual stream before and
    after each `TransformerBlock` or Evoformer block. In the latter, the
    alignment is at 'block/msa' and the pairs are at 'block/pair'.
  - 'input' and 'output': the first argument and the (first) result of any
    module, where they are arrays of two or more axes.

  Attention is captured from `MultiHeadAttention`, `GatedAttention`,
  `GlobalAttention`, `hk.MultiHeadAttention`, and any module that implements
  `attend` and `pattern` of `MultiHeadAttention`; blocks and modules inside
  `hk.layer_stack`, `hk.remat`, Haiku's loops and AlphaFold's own stack. Only
  the selected values are computed. Use `jax.jit` for large models.

  Args:
    function: an argument or result of `hk.transform` or
      `hk.transform_with_state`.
    params: the parameters of the function.
    *args: positional arguments of the function.
    what: one or more names from the list above.
    layers: one or more module paths, as in the result, where `*` is a wildcard,
      or their indices in the result; all by default.
    heads: indices of the heads to return; all by default. They do not select
      from keys and values.
    queries: positions of the queries, or of the streams, to return; all by
      default.
    edits: as in `attention.edit`, made before values are captured: a replaced
      pattern is captured as it was replaced.
    rng: a `jax.random` key, if the function uses random numbers.
    state: the Haiku state of the function, if any.
    **kwargs: keyword arguments of the function.

  Returns:
    (output, values): the output of the plain (or edited) call, and a dict from
    module path to array, or, if `what` is a tuple, a dict of them by name.
    Values of a module in a stack (`hk.layer_stack`, `EvoformerStack`) have a
    leading layer axis. The second call of a module is at 'path#1', and so on.

  Raises:
    ValueError: a kind, layer, head or query does not exist (the message lists
      those that do), or the function has no such values.
  """
  kinds = (what,) if isinstance(what, str) else tuple(what)
  init, apply = sites.stateful(function)
  selection = sites.Selection(heads, queries)
  known = sites.discover(init, kinds, args, kwargs, selection)
  chosen = {kind: sites.choose(layers, kind, known[kind]) for kind in kinds}
  flat = [site for of_kind in chosen.values() for site in of_kind]
  visitors = [_Recorder(flat, selection)]
  leaves = sites.leaves_of(known, flat)
  for site in flat:
    leaves[site.scope].update(_leaves(site))
  if edits:
    editor = Editor.create(init, edits, args, kwargs)
    visitors.insert(0, editor)
    for scope, more in editor.leaves.items():
      leaves[scope].update(more)
  output, _, after = sites.run(
    visitors, apply, params, state, leaves, rng, args, kwargs
  )
  values = {
    kind: {site.path: after[site.scope][f'site:{site.key}'] for site in of_kind}
    for kind, of_kind in chosen.items()
  }
  return output, values[what] if isinstance(what, str) else values


def _leaves(site):
  """State that a value replaces, or that AlphaFold's stack carries."""
  is_float = jnp.issubdtype(site.value.dtype, jnp.floating)
  empty = np.nan if is_float else 0
  if site.stack and not site.is_carried:
    return {f'site:{site.key}': np.zeros(site.stack, bool)}
  shape = (*site.stack, *site.value.shape)
  leaves = {f'site:{site.key}': jnp.full(shape, empty, site.value.dtype)}
  if site.is_carried:
    leaves[f'index:{site.key}'] = jnp.int32(0)
  return leaves


class _Recorder(sites.Visitor):
  """Replaces the leaves of the chosen sites by their values."""

  def __init__(self, chosen, selection):
    super().__init__(chosen)
    self._selection = selection

  def at(self, module, kind, *, is_part=False):
    number = self.number(module, kind)
    name = f'{kind}#{number}'
    if number is None or sites.read(f'site:{name}') is None:
      return None

    def store(value):
      chosen = self._selection.of(kind, value)
      leaf = sites.read(f'site:{name}')
      if self.carried:
        index = sites.read(f'index:{name}')
        hk.set_state(f'index:{name}', index + 1)
        chosen = leaf.at[index % self.carried].set(chosen)
      elif isinstance(leaf, jax.core.Tracer) and leaf.shape == chosen.shape:
        chosen = chosen.astype(leaf.dtype)  # a loop may carry it
      hk.set_state(f'site:{name}', chosen)
      return value

    return sites.Visit(store, selection=self._selection.of_pattern(kind))
