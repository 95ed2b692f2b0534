"""Language models in folders that transformers reads and writes."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from attention.data.files import read_text
from attention.data.subwords import Subwords
from attention.modules import lora
from attention.training.tasks.language import Language


def load(folder, *, dtype=np.float32, sharding=None) -> tuple:
  """Load a model and its tokenizer.

  Args:
    folder: has config.json, *.safetensors and perhaps tokenizer.json.
    dtype: of the parameters; None for those of the files.
    sharding: see `attention.interop.transformers.load`.

  Returns:
    (fields of `GPT`, parameters, `Subwords` or None).

  Raises:
    ValueError: a file is damaged, the model is of an unknown architecture, or
      the tokenizer has more tokens than the model.
    OSError: a file cannot be read.
  """
  folder = pathlib.Path(folder)
  fields = load_fields(folder)
  vocabulary = _load_vocabulary(folder, fields['vocab_size'])
  _, params = _interop().load(folder, dtype=dtype, sharding=sharding)
  return fields, params, vocabulary


def is_one(folder) -> bool:
  """Whether a folder has a model of transformers, rather than a run of ours."""
  path = pathlib.Path(folder) / 'config.json'
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError):
    return False
  return isinstance(config, dict) and 'model_type' in config


def load_fields(folder) -> dict:
  """Load the fields of `GPT` only.

  Raises:
    ValueError: as `load`.
    OSError: as `load`.
  """
  fields = _interop().load_fields(folder)
  del fields['model']
  return fields


def load_task(folder, dtype: str | None = None) -> tuple[Language, dict]:
  """Load a model to use it, on the first device.

  Args:
    folder: has config.json, *.safetensors and tokenizer.json.
    dtype: of the parameters; None for those of the files.

  Returns:
    (task, params). Texts start and end with the tokens that the tokenizer and
    the config ask for.

  Raises:
    ValueError: as `load`, or there is no tokenizer.json.
    OSError: as `load`.
  """
  folder = pathlib.Path(folder)
  if not (folder / 'tokenizer.json').exists():
    load_fields(folder)  # there may be nothing at all
    raise ValueError(f'{folder}: expected tokenizer.json, found none')
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  dtype = None if dtype is None else jnp.dtype(dtype)
  fields, params, vocabulary = load(folder, dtype=dtype, sharding=device)
  task = Language(vocabulary, fields, None)
  task.prefix = vocabulary.prefix
  task.end = _load_end(folder)
  return task, params


def _load_end(folder):
  """The tokens that end a text, or None."""
  for name in ('generation_config.json', 'config.json'):
    path = folder / name
    if not path.exists():
      continue
    end = json.loads(read_text(str(path))).get('eos_token_id')
    if end is not None:
      return tuple(end) if isinstance(end, list) else end
  return None


def _load_vocabulary(folder, vocab_size):
  path = folder / 'tokenizer.json'
  if not path.exists():
    return None
  text = read_text(str(path))
  try:
    vocabulary = Subwords(_without_surplus(text, vocab_size))
    size = vocabulary.size
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  if size > vocab_size:
    raise ValueError(
      f"{path}: expected at most {vocab_size:,} tokens, the model's "
      f'vocab_size, got {size:,}'
    )
  return vocabulary


def _without_surplus(text, vocab_size):
  """A tokenizer.json without added tokens that the model has no ids for.

  Gemma 3's has one, for images.
  """
  tokenizer = json.loads(text)
  added = tokenizer.get('added_tokens') or []
  kept = [token for token in added if token['id'] < vocab_size]
  if len(kept) == len(added):
    return text
  return json.dumps({**tokenizer, 'added_tokens': kept}, ensure_ascii=False)


def _interop():
  try:
    from attention.interop import transformers
  except ImportError as error:  # its message says what to install
    raise ValueError(str(error)) from None
  return transformers


def save(folder: pathlib.Path, task, params: dict) -> list[str]:
  """Write a model with its low-rank updates merged, and its tokenizer.

  Args:
    folder: is created; it must be empty if it exists.
    task: a `Language`.
    params: its parameters.

  Returns:
    Lines for the user: the files, and what could not be written.

  Raises:
    ValueError: the folder is not empty, or transformers has no counterpart of
      the model. Nothing is written then.
    OSError: a file cannot be written.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f'--out: expected a new or an empty folder, got {folder}')
  fields, params = merged(task.model_fields, params)
  _interop().save(folder, fields, params)
  notes = []
  if isinstance(task.vocabulary, Subwords):
    (folder / 'tokenizer.json').write_text(task.vocabulary.json)
  else:
    kind = type(task.vocabulary).__name__.lower()
    notes = [f'no tokenizer.json: transformers has no tokenizer of {kind}']
  return [*map(str, sorted(folder.iterdir())), *notes]


def merged(fields: dict, params: dict) -> tuple[dict, dict]:
  """Return the fields and parameters of a GPT without low-rank updates."""
  fields = dict(fields)
  updates = fields.pop('lora', None) or {}
  if updates.get('rank'):
    params = lora.merge(params, alpha=updates['alpha'])
  return fields, params
