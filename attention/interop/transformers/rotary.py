"""Rotary codes: the keys of a config.json and the fields of `Rotary`."""

from attention.interop.transformers.config import Config
from attention.ops.positions import Rotary

# Their names of further numbers of each scaling; see `Rotary`.
_NUMBERS = {
  'default': {},
  'linear': {'factor': 'factor'},
  'llama3': {
    'factor': 'factor',
    'low_frequency': 'low_freq_factor',
    'high_frequency': 'high_freq_factor',
    'original_length': 'original_max_position_embeddings',
  },
  'yarn': {
    'factor': 'factor',
    'beta_slow': 'beta_slow',
    'beta_fast': 'beta_fast',
    'original_length': 'original_max_position_embeddings',
    'amplitude': 'attention_factor',
  },
}
_OPTIONAL = ('beta_slow', 'beta_fast', 'amplitude')


def to_fields(rope: Config | None, base, length) -> dict:
  """The fields of `Rotary`.

  Args:
    rope: rope_scaling or rope_parameters, or None.
    base: where they have no rope_theta.
    length: where they have no original_max_position_embeddings.

  Raises:
    ValueError: a scaling or a key that `Rotary` has no counterpart of.
  """
  fields = {'base': base, 'pairs': 'halves'}
  if rope is None:
    return fields
  fields['base'] = rope.number('rope_theta', base)
  kind = rope.choice('rope_type', _NUMBERS, rope.get('type', 'default'))
  # The architectures rotate all channels.
  rope.choice('partial_rotary_factor', (1.0,), 1.0)
  if kind != 'default':
    fields['scaling'] = kind
  for ours, theirs in _NUMBERS[kind].items():
    default = float(length) if ours == 'original_length' else None
    value = rope.number(theirs, default)
    if value is None and ours not in _OPTIONAL:
      rope.require((theirs,))
    if value is not None:
      fields[ours] = int(value) if ours == 'original_length' else value
  if kind == 'yarn':
    fields['with_whole_pairs'] = rope.flag('truncate', True)
  rope.get('original_max_position_embeddings')
  rope.check_all_read(is_strict=True)
  return fields


def to_config(rotary: dict | None):
  """(rope_theta, rope_scaling or None)."""
  rotary = Rotary(**(rotary or {}))
  scaling = {}
  kind = 'default' if rotary.scaling == 'none' else rotary.scaling
  for ours, theirs in _NUMBERS[kind].items():
    if (value := getattr(rotary, ours)) is not None:
      scaling[theirs] = value
  if kind == 'yarn':
    scaling['truncate'] = rotary.with_whole_pairs
  return rotary.base, {'rope_type': kind, **scaling} if scaling else None
