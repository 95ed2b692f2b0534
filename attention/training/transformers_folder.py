"""Language models in folders that transformers reads and writes."""

import pathlib

import jax
import numpy as np

from attention.data.files import read_text
from attention.data.subwords import Subwords
from attention.modules import lora


def _interop():
  try:
    from attention.interop import gpt2
  except ImportError as error:  # its message says what to install
    raise ValueError(str(error)) from None
  return gpt2


def load(folder: pathlib.Path) -> tuple[dict, dict, Subwords | None]:
  """Load a model and its tokenizer.

  Args:
    folder: has config.json, *.safetensors and perhaps tokenizer.json.

  Returns:
    (fields of `GPT`, parameters in float32, vocabulary or None).

  Raises:
    ValueError: a file is damaged, or the model is of an unknown architecture.
    OSError: a file cannot be read.
  """
  fields, params = _interop().load(folder)
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
  path = folder / 'tokenizer.json'
  if not path.exists():
    return fields, params, None
  vocabulary = Subwords(read_text(str(path)))
  try:
    size = vocabulary.size
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None
  if size > fields['vocab_size']:
    raise ValueError(
      f'{path}: expected at most {fields["vocab_size"]:,} tokens, the '
      f"model's vocab_size, got {size:,}"
    )
  return fields, params, vocabulary


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
