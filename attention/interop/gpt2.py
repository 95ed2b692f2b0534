"""Conversion between GPT-2's published weights (Radford et al. 2019) and `GPT`.

Folders have the format of transformers: `config.json` and safetensors files.
"""

import dataclasses
import json
import os
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention import models
from attention.interop.shapes import differences
from attention.models.gpt import GPT
from attention.modules.multihead import MultiHeadAttention

try:
  from safetensors import SafetensorError
  from safetensors import numpy as safetensors
except ImportError:
  raise ImportError(
    "GPT-2 files require safetensors: pip install -e '.[interop]'"
  ) from None

_FIELDS = {
  'vocab_size': 'vocab_size',
  'context_size': 'n_positions',
  'num_layers': 'n_layer',
  'num_heads': 'n_head',
  'model_size': 'n_embd',
  'with_tied_output': 'tie_word_embeddings',
}
# Settings that `GPT` supports; the config may omit them.
_FIXED = {
  'activation_function': 'gelu_new',
  'layer_norm_epsilon': 1e-5,
  'scale_attn_weights': True,
  'scale_attn_by_inverse_layer_idx': False,
  'add_cross_attention': False,
}
_DEFAULTS = {'tie_word_embeddings': True}
_DROPOUT = ('attn_pdrop', 'embd_pdrop', 'resid_pdrop')
_NORM = {'scale': 'weight', 'offset': 'bias'}
_LINEAR = {'w': 'weight', 'b': 'bias'}  # GPT-2's Conv1D has shape [in, out] too
_BLOCK = {
  'attention_norm': ('ln_1', _NORM),
  'attention/qkv': ('attn.c_attn', _LINEAR),
  'attention/linear': ('attn.c_proj', _LINEAR),
  'feed_forward_norm': ('ln_2', _NORM),
  'expand': ('mlp.c_fc', _LINEAR),
  'contract': ('mlp.c_proj', _LINEAR),
}
# Fields whose values GPT-2's files hold, or that change no output.
_FREE = {
  *_FIELDS,
  'attention',
  'dropout_rate',
  'fused_qkv',
  'hidden_size',  # as the shapes of the parameters show
  'implementation',
  'use_remat',
  'use_scan',
}
_MASKS = ('.attn.bias', '.attn.masked_bias')  # constant masks in older files
_OUTPUT = 'lm_head.weight'


def load(folder) -> tuple[dict, dict]:
  """Load a GPT-2 model from a folder.

  `models.create('gpt', **fields)` inside `hk.transform` has these parameters.

  Args:
    folder: a folder with `config.json` and `model.safetensors`. Without
      `model.safetensors`, all `*.safetensors` files are read.

  Returns:
    (fields, params): the fields of `GPT`, and {module: {name: NumPy array}} in
    the dtypes of the files.

  Raises:
    FileNotFoundError: If the config or the weights do not exist.
    ValueError: If the architecture is not GPT-2's (the message names the config
      key), a file is damaged, an array is in two files or is not floating
      point, or arrays are missing, unexpected or misshapen (all are listed).
  """
  folder = pathlib.Path(folder)
  fields = _read_config(folder / 'config.json')
  found = _read_arrays(folder)
  found = {k: a for k, a in found.items() if not k.endswith(_MASKS)}
  if fields['with_tied_output']:
    found.pop(_OUTPUT, None)  # some files repeat the embedding table
  shapes, names = _expected_shapes(fields), _gpt2_keys(fields)
  wrong = differences(
    {key: _transpose_output(key, array).shape for key, array in found.items()},
    {names[at]: shape for at, shape in shapes.items()},
  )
  if wrong:
    raise ValueError(f'{folder}: {"; ".join(wrong)}')
  for key, array in found.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f'{folder}: {key}: expected floats, got {array.dtype}')
  params = {}
  for (module, leaf), key in names.items():
    params.setdefault(module, {})[leaf] = _transpose_output(key, found[key])
  return fields, params


def save(folder, fields: dict, params: dict) -> None:
  """Write a `GPT` for `GPT2LMHeadModel.from_pretrained` of transformers.

  Args:
    folder: the output folder, created if necessary. `config.json` and
      `model.safetensors` are replaced.
    fields: the fields of `GPT`, as in `config.model` of a run or returned by
      `load`, including vocab_size.
    params: {module: {name: array}} of a module named 'gpt'.

  Raises:
    ValueError: If fields are missing or unknown, a field makes the model differ
      from GPT-2 (such as another activation or a window), or the parameters do
      not match the fields (all differences are listed).
      Nothing is written in these cases.
  """
  fields = {'with_tied_output': True} | dict(fields)
  for what, names in {
    'missing': _FIELDS.keys() - fields.keys(),
    'unknown': fields.keys() - GPT.__dataclass_fields__.keys(),
  }.items():
    if names:
      raise ValueError(f'fields: {what} {", ".join(sorted(names))}')
  fields = models.resolve('gpt', fields)
  _check_variants(GPT, fields)
  _check_variants(MultiHeadAttention, fields.get('attention') or {})
  dropout_rate = float(fields.get('dropout_rate', 0.0))
  fields = {field: np.array(fields[field]).item() for field in _FIELDS}
  flat = {
    (module, name): np.asarray(array)
    for module, name, array in hk.data_structures.traverse(_fuse_qkv(params))
  }
  shapes, names = _expected_shapes(fields), _gpt2_keys(fields)
  wrong = differences(
    {'//'.join(at): array.shape for at, array in flat.items()},
    {'//'.join(at): shape for at, shape in shapes.items()},
  )
  if wrong:
    raise ValueError(f'params: {"; ".join(wrong)}')
  arrays = {
    key if key == _OUTPUT else f'transformer.{key}': np.ascontiguousarray(
      _transpose_output(key, flat[at])
    )
    for at, key in names.items()
  }
  config = {
    **{theirs: fields[ours] for ours, theirs in _FIELDS.items()},
    **_FIXED,
    **dict.fromkeys(_DROPOUT, dropout_rate),
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'bos_token_id': None,
    'eos_token_id': None,
  }
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json.part').write_text(json.dumps(config, indent=2))
  weights = folder / 'model.safetensors.part'
  safetensors.save_file(arrays, weights, metadata={'format': 'pt'})
  for name in ('model.safetensors', 'config.json'):
    os.replace(folder / f'{name}.part', folder / name)


def _check_variants(cls, values):
  """Raises ValueError for a field that GPT-2 has no counterpart of."""
  for field in dataclasses.fields(cls):
    value = values.get(field.name, field.default)
    if field.name not in _FREE and value != field.default:
      raise ValueError(
        f'{field.name}: expected {field.default!r} for GPT-2, got {value!r}'
      )


def _read_arrays(folder):
  """Read {name: array} from all files."""
  whole = folder / 'model.safetensors'
  paths = [whole] if whole.exists() else sorted(folder.glob('*.safetensors'))
  if not paths:
    raise FileNotFoundError(
      f'{folder}: expected *.safetensors files, got none; convert weights in '
      'another format with save_pretrained of transformers'
    )
  found, origins = {}, {}
  for path in paths:
    try:
      arrays = safetensors.load_file(path)
    except SafetensorError as error:
      raise ValueError(f'{path}: not safetensors: {error}') from None
    for key, array in arrays.items():
      key = key.removeprefix('transformer.')
      if key in found:
        raise ValueError(f'{key}: expected once, got {origins[key]} and {path}')
      found[key], origins[key] = array, path
  return found


def _read_config(path):
  try:
    config = json.loads(path.read_text())
  except FileNotFoundError:
    raise FileNotFoundError(
      f'{path.parent}: expected a folder with config.json and *.safetensors, '
      'found no config.json'
    ) from None
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(config, dict):
    raise ValueError(f'{path}: expected an object, got {config!r:.40}')
  config = _DEFAULTS | config
  if config.get('model_type') != 'gpt2':
    raise ValueError(
      f"{path}: model_type: expected 'gpt2', got {config.get('model_type')!r}"
    )
  missing = sorted(set(_FIELDS.values()) - config.keys())
  if missing:
    raise ValueError(f'{path}: missing {", ".join(missing)}')
  for key in _FIELDS.values():
    value, is_flag = config[key], key in _DEFAULTS
    if type(value) is not (bool if is_flag else int) or value < 1 - is_flag:
      expected = 'true or false' if is_flag else 'a positive integer'
      raise ValueError(f'{path}: {key}: expected {expected}, got {value!r}')
  fixed = _FIXED | {'n_inner': 4 * config['n_embd']}
  for key, value in fixed.items():
    if config.get(key) not in (None, value):
      raise ValueError(
        f'{path}: {key}: expected {value!r}, got {config[key]!r}'
      )
  return {ours: config[theirs] for ours, theirs in _FIELDS.items()}


def _expected_shapes(fields):
  """Return {(module, name): shape} of the parameters of `GPT`."""
  model = hk.transform(lambda tokens: GPT(**fields)(tokens))
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return {
    (module, name): array.shape
    for module, name, array in hk.data_structures.traverse(shapes)
  }


def _gpt2_keys(fields):
  """Return {(module, name): GPT-2 key}."""
  modules = {'gpt/final_norm': ('ln_f', _NORM)} | {
    f'gpt/block_{i}/{ours}': (f'h.{i}.{theirs}', leaves)
    for i in range(fields['num_layers'])
    for ours, (theirs, leaves) in _BLOCK.items()
  }
  names = {
    ('gpt/tokens', 'embeddings'): 'wte.weight',
    ('gpt', 'positions'): 'wpe.weight',
  } | {
    (module, ours): f'{theirs}.{leaf}'
    for module, (theirs, leaves) in modules.items()
    for ours, leaf in leaves.items()
  }
  if not fields['with_tied_output']:
    names['gpt/output', 'w'] = _OUTPUT
  return names


def _transpose_output(key, array):
  """Transpose the output matrix, which GPT-2 stores as [out, in]."""
  return array.T if key == _OUTPUT else array


def _fuse_qkv(params):
  """Concatenate matching query, key and value parameters to one `qkv`."""
  params = dict(params)
  for query in [m for m in params if m.endswith('/attention/query')]:
    stem = query.removesuffix('query')
    names = [stem + part for part in ('query', 'key', 'value')]
    parts = [params.get(name, {}) for name in names]
    shapes = [{k: np.shape(a) for k, a in part.items()} for part in parts]
    if shapes[0] == shapes[1] == shapes[2]:
      params[f'{stem}qkv'] = {
        leaf: np.concatenate([part[leaf] for part in parts], axis=-1)
        for leaf in parts[0]
      }
      for name in names:
        del params[name]
  return params
