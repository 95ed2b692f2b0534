"""Whole models, built from `attention.modules`."""

import dataclasses

from attention.models.classifier import Classifier
from attention.models.gpt import GPT
from attention.models.msa import MSA
from attention.models.pairwise import Pairwise
from attention.models.translator import Translator
from attention.modules.evoformer import EvoformerStack
from attention.modules.experts import Experts
from attention.modules.fields import check_count, hint
from attention.modules.lora import Lora
from attention.modules.multihead import MultiHeadAttention
from attention.ops.positions import Rotary

_MODELS = {
  'classifier': Classifier,
  'gpt': GPT,
  'msa': MSA,
  'pairwise': Pairwise,
  'translator': Translator,
}
_POSITIVE = (
  'num_layers',
  'num_heads',
  'model_size',
  'key_size',
  'length',
  'hidden_size',
  'context_size',
  'vocab_size',
  'num_classes',
  'num_blocks',
  'msa_size',
  'pair_size',
  'extra_msa_size',
)
_ATTENTION = (
  MultiHeadAttention,
  {'num_heads', 'dropout_rate', 'w_init', 'output_w_init', 'name'},
)
# Modules whose fields are a dict in their model's; the model sets some itself.
_PARTS = {
  'attention': _ATTENTION,
  'window_attention': _ATTENTION,
  'attention.rotary': (Rotary, set()),
  'window_attention.rotary': (Rotary, set()),
  'experts': (Experts, {'w_init', 'output_w_init', 'name'}),
  'evoformer': (EvoformerStack, {'num_blocks', 'is_extra_msa', 'name'}),
  'lora': (Lora, set()),
}


def classes() -> tuple[type, ...]:
  """The classes of all models."""
  return tuple(_MODELS.values())


def create(name: str, **fields):
  """Creates a model; call it inside `hk.transform`.

  Command lines cannot give None, so 0 and '' stand for it in optional fields,
  such as `window` and `implementation`, and in those of `attention`,
  `evoformer` and `lora`.

  Args:
    name: 'classifier', 'gpt', 'msa', 'pairwise' or 'translator'.
    **fields: fields of the model's class.

  Raises:
    ValueError: an unknown model or field, with the nearest name, or a size
      below 1.
  """
  if name not in _MODELS:
    raise ValueError(f'model: expected one of {sorted(_MODELS)}, got {name!r}')
  fields = resolve(name, fields)
  for field in _POSITIVE:
    check_count(f'model.{field}', fields.get(field))
  return _MODELS[name](**fields)


def resolve(name: str, fields: dict) -> dict:
  """The fields of a model with None for 0 and ''; see `create`."""
  fields = _resolve(_MODELS[name], fields, 'model')
  for path, (cls, hidden) in _PARTS.items():
    *above, part = path.split('.')
    values = fields
    for key in above:
      values = values.get(key) or {}
    if values.get(part):
      values[part] = _resolve(cls, values[part], f'model.{path}', hidden)
  return fields


def _resolve(cls, values, path, hidden=frozenset()):
  known = {
    field.name: field
    for field in dataclasses.fields(cls)
    if field.name not in hidden
  }
  for key in values:
    if key not in known:
      raise ValueError(
        f'{path}.{key}: {cls.__name__} has no such field{hint(key, known)}'
      )
  return {
    key: None
    if known[key].default is None and value in (0, '') and value is not False
    else value
    for key, value in values.items()
  }
