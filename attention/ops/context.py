"""Attention between positions that are cut over devices."""

from jax import lax

from attention.ops.arguments import check
from attention.ops.implementations.ring import Ring

_LAYOUTS = ('contiguous', 'striped')


def context_attention(
  query, key, value, *, axis_name: str, layout: str = 'contiguous', **arguments
):
  """`dot_product_attention` in `jax.shard_map`, over a mesh axis of positions.

  Each device has a shard of the queries, keys and values, and gets the outputs
  of its queries, as one device would compute them from all positions. Keys and
  values travel around a ring (Liu et al. 2023); no device holds all of them.
  The function is differentiable. It needs `check_vma=False` in `shard_map`.

  Args:
    query: [*b, q/n, h, d], this device's queries; n devices.
    key: [*b, k/n, g, d].
    value: [*b, k/n, g, e].
    axis_name: the mesh axis that cuts positions.
    layout: 'contiguous', where device i has positions i·q/n to (i + 1)·q/n - 1,
      or 'striped', where it has positions i, i + n, i + 2n, … Causal work is
      the same on all devices only if it is striped (Brandon et al. 2023).
    **arguments: bias, mask, is_causal, scale, logit_cap, sinks, dropout_rate
      and dropout_rng of `dot_product_attention`. Masks and biases count global
      positions. Arrays [..., q, k] of a bias or mask have this device's queries
      and all keys, in their global order; so has the gradient of the bias. The
      ids of segments are this device's.

  Returns:
    [*b, q/n, h, e] in the dtype of `query`.

  Raises:
    ValueError: as `dot_product_attention`; an unknown layout; in a striped
      layout, fewer or more queries than keys.
  """
  if layout not in _LAYOUTS:
    raise ValueError(f'layout: expected one of {_LAYOUTS}, got {layout!r}')
  count = lax.axis_size(axis_name)
  checked = check(query, key, value, num_shards=count, **arguments)
  query, key, value, options = checked
  if layout == 'striped' and query.shape[-3] != key.shape[-3]:
    raise ValueError(
      'layout: expected as many queries as keys if striped, got '
      f'{query.shape[-3]} and {key.shape[-3]} on each device'
    )
  return Ring(axis_name, layout == 'striped')(query, key, value, options)
