"""Folders of transformers' language models, as Haiku functions and back.

A folder has a `config.json` and safetensors files. `load` and `save` know GPT-2
and the decoders of Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 (text) and
gpt-oss (unquantised).
"""

import json
import os
import pathlib

import haiku as hk
import jax
import numpy as np

from attention import models
from attention.interop.shapes import differences
from attention.interop.transformers import families
from attention.interop.transformers.config import Config
from attention.interop.transformers.layout import arrange_qkv, pair_halves
from attention.interop.transformers.normal_form import compare, normal_form
from attention.interop.transformers.weights import Weights, write

ARCHITECTURES = tuple(f.architecture for f in families.FAMILIES)


def load(folder, *, dtype=None, sharding=None) -> tuple[dict, dict]:
  """Load a language model from a folder.

  `models.create(fields.pop('model'), **fields)` inside `hk.transform` has these
  parameters. Beside the model, one tensor at most is in memory.

  Args:
    folder: a folder with `config.json` and `model.safetensors`, or files of an
      index, or any `*.safetensors`.
    dtype: of the parameters; by default those of the files.
    sharding: puts the parameters on devices: a `jax.sharding.Sharding` for all,
      or a function of the tree of their shapes (`jax.ShapeDtypeStruct`) that
      returns the tree of their shardings. Each process reads the shares of its
      devices only. By default they stay on the host.

  Returns:
    (fields, params): the fields of `GPT` with 'model': 'gpt', and {module:
    {name: array}}, NumPy arrays unless `sharding` is given.

  Raises:
    FileNotFoundError: the config or weights do not exist.
    ValueError: an unknown architecture, something in the config that `GPT` does
      not compute (the message names the key), a damaged file, a tensor in two
      files or not of floats, or tensors that are missing, unexpected or
      misshapen (all are listed).
  """
  folder = pathlib.Path(folder)
  family, fields = _read_config(folder)
  shapes = _shapes(fields)
  stored = _stored(family, fields, shapes)
  tree = {}
  with Weights(folder) as weights:
    weights.rename(_known_key(fields, {x.key for x in stored.values()}))
    _check(folder, weights, shapes, stored)
    place = _placement(shapes, sharding)
    for at, shape in shapes.items():

      def read(index=None, at=at):
        part = weights.read(stored[at], index)
        return part if dtype is None else part.astype(dtype, copy=False)

      array = read() if place is None else place(at, shape, read)
      tree.setdefault(at[0], {})[at[1]] = array
  return {'model': 'gpt', **fields}, tree


def load_fields(folder) -> dict:
  """The fields that `load` returns, without reading weights.

  Raises:
    FileNotFoundError: the config does not exist.
    ValueError: see `load`.
  """
  return {'model': 'gpt', **_read_config(pathlib.Path(folder))[1]}


def save(
  folder, fields: dict, params: dict, *, max_file_bytes: int = 5 * 10**9
) -> None:
  """Write a `GPT` for `AutoModelForCausalLM.from_pretrained` of transformers.

  The architecture is the first of `ARCHITECTURES` that computes the same.

  Args:
    folder: the output folder, created if necessary. `config.json` and
      `model*.safetensors` are replaced.
    fields: the fields of `GPT`, as in `config.model` of a run or returned by
      `load`, including vocab_size.
    params: {module: {name: array}} of a module named 'gpt'.
    max_file_bytes: a larger model is split into files with an index.

  Raises:
    ValueError: fields are missing or unknown, no architecture computes the same
      (the message names the nearest one and the field that differs), or the
      parameters do not match the fields (all differences are listed). Nothing
      is written in these cases.
  """
  fields = {k: v for k, v in fields.items() if k != 'model'}
  form = normal_form(fields)
  is_adjacent = _use_halves(form)
  family, config = _family_of(form)
  fields = family.to_fields(Config(config, 'config.json'))
  shapes = _shapes(fields)
  params = arrange_qkv(
    params,
    form['attention'],
    form['num_heads'],
    is_fused=fields.get('fused_qkv', True),
  )
  flat = {
    (module, name): array
    for module, name, array in hk.data_structures.traverse(params)
  }
  wrong = differences(
    {'//'.join(at): np.shape(array) for at, array in flat.items()},
    {'//'.join(at): shape for at, shape in shapes.items()},
  )
  if wrong:
    raise ValueError(f'params: {"; ".join(wrong)}')
  if is_adjacent:
    params = pair_halves(params, form['attention'])
    flat = {(module, name): params[module][name] for module, name in flat}
  stored = _stored(family, fields, shapes)
  parts = {}
  for at, where in stored.items():
    parts.setdefault(where.key, []).append((where, flat[at]))
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  first = next(iter(flat.values()))
  config |= {
    'model_type': family.model_type,
    'architectures': [family.architecture],
    'torch_dtype': np.dtype(first.dtype).name,
    'bos_token_id': None,
    'eos_token_id': None,
    'pad_token_id': None,
  }
  text = json.dumps(config, indent=2)
  (folder / 'config.json.part').write_text(text)
  write(
    folder,
    {key: _Joined(part) for key, part in parts.items()},
    lambda key: _Joined(parts[key]).array(),
    max_file_bytes,
  )
  os.replace(folder / 'config.json.part', folder / 'config.json')


class _Joined:
  """A tensor of a file, from the arrays that it stores."""

  def __init__(self, part):
    self._part = part
    where, array = part[0]
    self.dtype = np.dtype(array.dtype)
    self.shape = where.tensor_shape(np.shape(array))

  def array(self) -> np.ndarray:
    where, array = self._part[0]
    if where.column is None:
      array = np.asarray(array)
      return array.T if where.is_transposed else array
    joined = np.empty(self.shape, self.dtype)
    for where, array in self._part:
      joined[..., where.column :: 2] = np.asarray(array)
    return joined


def _use_halves(form):
  """Pair channels as all architectures do; returns whether none were so."""
  found = [
    form[part]['rotary']
    for part in ('attention', 'window_attention')
    if form[part] and form[part]['rotary']
  ]
  if not found or any(rotary['pairs'] != 'adjacent' for rotary in found):
    return False
  for rotary in found:
    rotary['pairs'] = 'halves'
  return True


def _family_of(form):
  """The first family that computes the same, and its config."""
  nearest, differing = None, None
  for family in families.FAMILIES:
    config = family.to_config(form)
    back = normal_form(family.to_fields(Config(config, family.architecture)))
    found = compare(form, back)
    if not found:
      return family, config
    if differing is None or len(found) < len(differing):
      nearest, differing = family, found
  # What is missing as a whole follows from another difference.
  path, ours, theirs = min(
    differing, key=lambda x: isinstance(x[1], dict) or isinstance(x[2], dict)
  )
  raise ValueError(
    f'{path}: expected {theirs!r} for {nearest.architecture}, the nearest '
    f'architecture, got {ours!r}'
  )


def _read_config(folder):
  config = Config.load(folder / 'config.json')
  family = families.find(config)
  fields = family.to_fields(config)
  config.check_all_read()
  return family, fields


def _shapes(fields):
  """{(module, name): shape} of the parameters of `GPT`."""
  model = hk.transform(lambda tokens: models.create('gpt', **fields)(tokens))
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  return {
    (module, name): array.shape
    for module, name, array in hk.data_structures.traverse(shapes)
  }


def _stored(family, fields, shapes):
  names = family.names(fields)
  return {at: names[at] for at in shapes}


def _known_key(fields, known):
  """A function of a file's key: the one that we expect, None to ignore it."""
  prefixes = {key.split('.')[0] for key in known} - {'lm_head'}

  def rename(key):
    # Constants of older files.
    if key.endswith(('.attn.bias', '.attn.masked_bias', '.inv_freq')):
      return None
    # Some files repeat the embedding table.
    if key == 'lm_head.weight' and fields['with_tied_output']:
      return None
    for prefix in prefixes:  # absent where a model without head was saved
      if key not in known and f'{prefix}.{key}' in known:
        return f'{prefix}.{key}'
    return key

  return rename


def _check(folder, weights, shapes, stored):
  tensors = {
    stored[at].key: stored[at].tensor_shape(shape)
    for at, shape in shapes.items()
  }
  wrong = differences(weights.shapes(), tensors)
  if wrong:
    raise ValueError(f'{folder}: {"; ".join(wrong)}')
  try:
    weights.check_floats()
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from None


def _placement(shapes, sharding):
  """A function (name, shape, read) -> array on devices, or None."""
  if sharding is None:
    return None
  if callable(sharding):
    tree = {}
    for (module, name), shape in shapes.items():
      struct = jax.ShapeDtypeStruct(shape, np.float32)
      tree.setdefault(module, {})[name] = struct
    of = sharding(tree)

    def find(at):
      return of[at[0]][at[1]]
  else:

    def find(at):
      return sharding

  return lambda at, shape, read: jax.make_array_from_callback(
    shape, find(at), read
  )
