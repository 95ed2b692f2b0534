"""Layouts of query, key and value: fused or apart, and pairs of channels."""

import numpy as np

_PARTS = ('query', 'key', 'value')


def arrange_qkv(params: dict, attention: dict, num_heads: int, is_fused: bool):
  """Fuse query, key and value of self-attention to one `qkv`, or split it.

  Args:
    params: {module: {name: array}}; incomplete projections stay as they are.
    attention: all fields of the attention.
    num_heads: the number of query heads.
    is_fused: the layout to return.

  Returns:
    params in that layout; arrays that are not concerned are not copied.
  """
  key, value = attention['key_size'], attention['value_size']
  kv_heads = attention['num_kv_heads']
  first = num_heads * key
  splits = [first, first + kv_heads * key]
  width = splits[1] + kv_heads * value
  found = dict(params)
  for module, leaves in params.items():
    stem = module.rpartition('/')[0]
    if is_fused and module.endswith('/attention/query'):
      parts = [params.get(f'{stem}/{part}', {}) for part in _PARTS]
      if parts[0].keys() == parts[1].keys() == parts[2].keys():
        found[f'{stem}/qkv'] = {
          leaf: np.concatenate([part[leaf] for part in parts], axis=-1)
          for leaf in parts[0]
        }
        for part in _PARTS:
          del found[f'{stem}/{part}']
    elif not is_fused and module.endswith('/attention/qkv'):
      if any(np.shape(array)[-1] != width for array in leaves.values()):
        continue
      del found[module]
      for i, part in enumerate(_PARTS):
        found[f'{stem}/{part}'] = {
          leaf: np.split(np.asarray(array), splits, axis=-1)[i]
          for leaf, array in leaves.items()
        }
  return found


def pair_halves(params: dict, attention: dict) -> dict:
  """Reorder channels for rotary codes whose pairs are i and i + n/2.

  Logits do not change if the channels of queries and keys are permuted alike.

  Args:
    params: parameters with query and key apart, for pairs 2i and 2i + 1.
    attention: all fields of the attention.
  """
  size = attention['key_size']
  order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
  found = dict(params)
  for module, leaves in params.items():
    if module.endswith(('/attention/query', '/attention/key')):
      found[module] = {
        leaf: _reorder(np.asarray(array), order)
        for leaf, array in leaves.items()
      }
    elif module.endswith(('/query_norm', '/key_norm')):
      found[module] = {'scale': np.asarray(leaves['scale'])[order]}
  return found


def _reorder(array, order):
  heads = array.reshape(*array.shape[:-1], -1, len(order))
  return heads[..., order].reshape(array.shape)
