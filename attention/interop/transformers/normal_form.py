"""One form of a model's fields, so that two sets of fields can be compared."""

import dataclasses
import math

from attention import models
from attention.models.gpt import GPT
from attention.modules.multihead import MultiHeadAttention
from attention.ops.positions import Rotary

# Fields that change no output of a model that has its parameters.
_FREE = {
  'attention',
  'dropout_rate',
  'fused_qkv',
  'implementation',
  'lora',
  'name',
  'num_heads',
  'output_w_init',
  'use_remat',
  'use_scan',
  'w_init',
  'window_attention',
  'window_pattern',
  'with_rotary',
}


def normal_form(fields: dict) -> dict:
  """Complete the fields of a GPT, and drop what changes no output.

  Returns:
    The fields of `GPT` with `window_layers`, a letter for each layer (w: it has
    the window, f: it has none), and `attention` and `window_attention`, all
    fields of attention in layers of either kind; None where there are none.

  Raises:
    ValueError: an unknown or missing field.
  """
  fields = {k: _plain(v) for k, v in fields.items()}
  defaults = _defaults(GPT)
  required = defaults.keys() - _optional(GPT)
  if missing := sorted(required - fields.keys()):
    raise ValueError(f'fields: missing {", ".join(missing)}')
  if unknown := sorted(fields.keys() - defaults.keys()):
    raise ValueError(f'fields: unknown {", ".join(unknown)}')
  fields = defaults | models.resolve('gpt', fields)
  width, count = fields['model_size'], fields['num_layers']
  pattern = fields['window_pattern'] if fields['window'] else 'f'
  layers = (pattern * count)[:count]
  found = {k: v for k, v in fields.items() if k not in _FREE}
  found |= {
    'num_heads': fields['num_heads'],
    'dropout_rate': float(fields['dropout_rate']),
    'window_layers': layers,
    'window': fields['window'] if 'w' in layers else None,
    'attention': _attention(fields, {}) if 'f' in layers else None,
    'window_attention': None,
  }
  if 'w' in layers:
    found['window_attention'] = _attention(
      fields, fields['window_attention'] or {}
    )
    found['attention'] = found['attention'] or found['window_attention']
  if fields['experts']:
    found['hidden_size'] = fields['experts']['hidden_size']
  elif fields['hidden_size'] is None:
    is_gated = fields['activation'] in ('geglu', 'swiglu')
    found['hidden_size'] = 8 * width // 3 if is_gated else 4 * width
  return found


def compare(ours: dict, theirs: dict, path: str = '') -> list[tuple]:
  """(path, ours, theirs) of each value that differs between normal forms."""
  found = []
  for key in sorted(ours.keys() | theirs.keys()):
    a, b = ours.get(key), theirs.get(key)
    if key == 'dropout_rate' or (key == 'window_attention' and not (a and b)):
      continue  # no output differs; or the window does, which is listed
    if isinstance(a, dict) and isinstance(b, dict):
      found += compare(a, b, f'{path}{key}.')
    elif a != b and not _are_near(a, b):
      found.append((path + key, a, b))
  return found


def _attention(fields, further):
  given = {**(fields['attention'] or {}), **further}
  found = _defaults(MultiHeadAttention) | given
  heads = fields['num_heads']
  found['num_kv_heads'] = found['num_kv_heads'] or heads
  found['key_size'] = found['key_size'] or fields['model_size'] // heads
  found['value_size'] = found['value_size'] or found['key_size']
  if found['scale'] is None:  # of other similarities, which differ anyway
    found['scale'] = found['key_size'] ** -0.5
  is_rotary = fields['positions'] == 'rotary' or found['with_rotary']
  rotary = _defaults(Rotary) | (found['rotary'] or {})
  if rotary['num_channels'] == found['key_size']:
    rotary['num_channels'] = None
  found['rotary'] = rotary if is_rotary else None
  of_model = {
    'epsilon': fields['norm_epsilon'],
    'is_zero_centred': fields['norm_kind'] == 'zero_centred_rms',
  }
  norm = of_model | (found['qk_norm'] or {})
  found['qk_norm'] = norm if found['with_qk_norm'] else None
  return {k: v for k, v in found.items() if k not in _FREE}


def _defaults(cls):
  return {
    field.name: None if field.default is dataclasses.MISSING else field.default
    for field in dataclasses.fields(cls)
  }


def _optional(cls):
  return {
    field.name
    for field in dataclasses.fields(cls)
    if field.default is not dataclasses.MISSING
  }


def _plain(value):
  """NumPy's numbers as Python's."""
  return value.item() if hasattr(value, 'item') else value


def _are_near(a, b):
  """Whether two floats differ by rounding only."""
  return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b)
