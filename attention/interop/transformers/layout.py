"""Query, key and value projections, fused to one or apart."""

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
