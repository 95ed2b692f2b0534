"""Whole models, made of `attention.modules`."""

import difflib

from attention.models.classifier import Classifier
from attention.models.gpt import GPT
from attention.models.translator import Translator

_MODELS = {'classifier': Classifier, 'gpt': GPT, 'translator': Translator}
_POSITIVE = (
  'num_layers',
  'num_heads',
  'model_size',
  'hidden_size',
  'context_size',
  'vocab_size',
  'num_classes',
)


def classes() -> tuple[type, ...]:
  """The classes of all models."""
  return tuple(_MODELS.values())


def create(name: str, **fields):
  """The model of that name; call it inside `hk.transform`.

  Args:
    name: 'classifier', 'gpt' or 'translator'.
    **fields: of its class.

  Raises:
    ValueError: an unknown model or field (says the nearest), or a size under 1.
  """
  if name not in _MODELS:
    raise ValueError(f'model: expected one of {sorted(_MODELS)}, got {name!r}')
  known = _MODELS[name].__dataclass_fields__
  for field in fields:
    if field not in known:
      near = difflib.get_close_matches(field, known, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else ''
      raise ValueError(f'model.{field}: {name} has no such field{hint}')
  for field in _POSITIVE:
    size = fields.get(field)
    if size is not None and size < 1:
      raise ValueError(f'model.{field}: expected 1 or more, got {size}')
  return _MODELS[name](**fields)
