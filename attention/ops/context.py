"""Attention between positions that are cut over devices."""

from jax import lax

from attention.ops.arguments import check
from attention.ops.implementations.dispatch import (
  Dispatched,
  OverPositions,
  names_of,
)

_LAYOUTS = ('contiguous', 'striped')
_METHODS = ('heads', 'ring')


def context_attention(
  query,
  key,
  value,
  *,
  axis_name: str,
  layout: str = 'contiguous',
  method: str | None = None,
  implementation=None,
  **arguments,
):
  """`dot_product_attention` in `jax.shard_map`, over a mesh axis of positions.

  Each device has a shard of the queries, keys and values, and gets the outputs
  of its queries, as one device would compute them from all positions. The
  function is differentiable. It needs `check_vma=False` in `shard_map`.

  There are two methods. Heads are exchanged: each device computes a share of
  the heads over all positions, and sends the outputs back (Jacobs et al. 2023,
  "DeepSpeed Ulysses"). Or keys and values travel around a ring, a piece at a
  time, and no device holds all positions (Liu et al. 2023, "Ring Attention").
  Causal work is the same on all devices: a ring over contiguous shards
  exchanges positions first, so that each device has every n-th (Brandon et al.
  2023, "Striped Attention").

  Args:
    query: [*b, q/n, h, d], this device's queries; n devices.
    key: [*b, k/n, g, d].
    value: [*b, k/n, g, e].
    axis_name: the mesh axis that cuts positions.
    layout: 'contiguous', where device i has positions i·q/n to (i + 1)·q/n - 1,
      or 'striped', where it has positions i, i + n, i + 2n, …
    method: 'heads' or 'ring'. By default heads are exchanged if n divides h and
      g, unless the layout is striped, dropout is applied, or an array of a mask
      or bias has no axis of h heads or q/n queries.
    implementation: as in `dot_product_attention`, of what a device computes at
      a time. Kernels run inside both methods.
    **arguments: bias, mask, is_causal, scale, logit_cap, sinks, dropout_rate
      and dropout_rng of `dot_product_attention`. Masks and biases count global
      positions. Arrays [..., q, k] of a bias or mask have this device's queries
      and all keys, in their global order; so has the gradient of the bias. The
      ids of segments are this device's.

  Returns:
    [*b, q/n, h, e] in the dtype of `query`.

  Raises:
    ValueError: as `dot_product_attention`; an unknown layout or method; heads
      cannot be exchanged; in a striped layout, fewer or more queries than keys.
  """
  if layout not in _LAYOUTS:
    raise ValueError(f'layout: expected one of {_LAYOUTS}, got {layout!r}')
  if method is not None and method not in _METHODS:
    raise ValueError(f'method: expected one of {_METHODS}, got {method!r}')
  count = lax.axis_size(axis_name)
  checked = check(query, key, value, num_shards=count, **arguments)
  query, key, value, options = checked
  if layout == 'striped' and query.shape[-3] != key.shape[-3]:
    raise ValueError(
      'layout: expected as many queries as keys if striped, got '
      f'{query.shape[-3]} and {key.shape[-3]} on each device'
    )
  attend = OverPositions(
    axis_name,
    Dispatched(tuple(names_of(implementation))),
    layout == 'striped',
    method,
  )
  return attend(query, key, value, options)
