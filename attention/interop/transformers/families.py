"""The architectures: their config.json as fields of `GPT`, and its inverse.

`to_fields` reads a config; `to_config` writes the config of a model whose
fields are in the normal form of `variants.normal_form`. A model that the
architecture cannot express is written as one that reads back differently, which
`save` detects.
"""

import dataclasses
from collections.abc import Callable

from attention.interop.transformers import names, rotary
from attention.interop.transformers.config import Config

_GELUS = ('gelu_new', 'gelu_pytorch_tanh')  # two names of one function
_LLAMA_SIZES = {
  'vocab_size': 'vocab_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'model_size': 'hidden_size',
  'hidden_size': 'intermediate_size',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """An architecture of transformers."""

  architecture: str
  model_type: str
  to_fields: Callable[[Config], dict]
  to_config: Callable[[dict], dict]
  names: Callable[[dict], dict]  # {(module, name): Stored} of the fields


def _gpt2_fields(config):
  config.require(('vocab_size', 'n_positions', 'n_layer', 'n_head', 'n_embd'))
  width = config.count('n_embd')
  config.choice('activation_function', _GELUS, 'gelu_new')
  for key, value in (
    ('scale_attn_weights', True),
    ('scale_attn_by_inverse_layer_idx', False),
    ('add_cross_attention', False),
  ):
    if config.flag(key, value) is not value:
      raise config.error(key, str(value).lower(), not value)
  hidden = config.count('n_inner', 4 * width)
  epsilon = config.number('layer_norm_epsilon', 1e-5)
  return {
    'vocab_size': config.count('vocab_size'),
    'context_size': config.count('n_positions'),
    'num_layers': config.count('n_layer'),
    'num_heads': config.count('n_head'),
    'model_size': width,
    'with_tied_output': config.flag('tie_word_embeddings', True),
    **({'hidden_size': hidden} if hidden != 4 * width else {}),
    **({'norm_epsilon': epsilon} if epsilon != 1e-5 else {}),
  }


def _gpt2_config(fields):
  return {
    'vocab_size': fields['vocab_size'],
    'n_positions': fields['context_size'],
    'n_layer': fields['num_layers'],
    'n_head': fields['num_heads'],
    'n_embd': fields['model_size'],
    'n_inner': fields['hidden_size'],
    'tie_word_embeddings': fields['with_tied_output'],
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': fields['norm_epsilon'],
    **dict.fromkeys(
      ('attn_pdrop', 'embd_pdrop', 'resid_pdrop'), fields['dropout_rate']
    ),
  }


@dataclasses.dataclass(frozen=True)
class _Llama:
  """Llama's decoder and those derived from it, told apart by these switches."""

  with_bias: bool = False  # of query, key and value
  with_output_bias: bool | None = None  # of attention's output; None: with_bias
  has_bias_key: bool = True  # attention_bias overrides with_bias
  has_mlp_bias_key: bool = False  # for biases of feed-forward layers
  with_qk_norm: bool = False
  is_gemma: bool = False  # its norms, activation, embeddings and scale
  with_tied_output: bool = False  # unless the config says so
  has_window: bool = False
  pattern: str = ''  # of windows by layer, where the config has no layer_types
  head_size: int | None = None  # defaults of the architecture
  num_kv_heads: int | None = None
  context_size: int = 32_768
  window: int = 4096
  base: float = 10_000.0
  window_base: float | None = None  # rotary base of layers with a window
  epsilon: float = 1e-6
  caps: tuple = (None, None)  # of attention and of the output

  def to_fields(self, config: Config) -> dict:
    config.require(tuple(_LLAMA_SIZES.values()))
    fields = {
      ours: config.count(theirs) for ours, theirs in _LLAMA_SIZES.items()
    }
    fields |= {
      'context_size': config.count(
        'max_position_embeddings', self.context_size
      ),
      'with_tied_output': config.flag(
        'tie_word_embeddings', self.with_tied_output
      ),
      'positions': 'rotary',
      'norm_kind': 'rms',
      'norm_epsilon': config.number('rms_norm_eps', self.epsilon),
      'activation': 'swiglu',
      'with_feed_forward_bias': config.flag('mlp_bias', False)
      if self.has_mlp_bias_key
      else False,
      'fused_qkv': False,
      'attention': self._attention(config, fields),
    }
    if self.is_gemma:
      self._add_gemma(config, fields)
    else:
      config.choice('hidden_act', ('silu',), 'silu')
    if self.has_window:
      fields |= self._windows(config, fields['num_layers'])
    self._rotary(config, fields)
    return fields

  def _attention(self, config, fields):
    heads = fields['num_heads']
    size = config.count('head_dim', self.head_size)
    bias = self.with_bias
    if self.has_bias_key:
      bias = config.flag('attention_bias', bias)
    output = bias if self.with_output_bias is None else self.with_output_bias
    return {
      'num_kv_heads': config.count('num_key_value_heads', self.num_kv_heads)
      or heads,
      'key_size': size or fields['model_size'] // heads,
      'with_bias': bias,
      'with_output_bias': output,
      **({'with_qk_norm': True} if self.with_qk_norm else {}),
    }

  def _add_gemma(self, config, fields):
    fields |= {
      'norm': 'both',
      'norm_kind': 'zero_centred_rms',
      'activation': 'geglu',
      'with_scaled_embeddings': True,
    }
    config.choice('hidden_activation', _GELUS, _GELUS[1])
    config.get('hidden_act')  # an older name, not in use
    config.choice('use_bidirectional_attention', (False,), False)
    attention = fields['attention']
    attention['scale'] = config.number('query_pre_attn_scalar', 256) ** -0.5
    for key, part, name, default in (
      ('attn_logit_softcapping', attention, 'logit_cap', self.caps[0]),
      ('final_logit_softcapping', fields, 'output_logit_cap', self.caps[1]),
    ):
      # Here null is no cap, rather than the default.
      cap = config.number(key) if config.has(key) else default
      if cap is not None:
        part[name] = cap

  def _windows(self, config, num_layers):
    window = self.window
    if config.has('sliding_window'):
      window = config.count('sliding_window')
    types = config.get('layer_types')
    period = config.count('sliding_window_pattern')
    period = config.count('_sliding_window_pattern', period)
    first = config.get('max_window_layers', 28)
    if type(first) is not int or first < 0:
      raise config.error('max_window_layers', 'an integer, 0 or more', first)
    if not self.pattern or window is None:
      return {'window': window} if window else {}
    if self.pattern == 'first':  # Qwen
      if not config.flag('use_sliding_window', False):
        return {}
      pattern = 'f' * min(first, num_layers) + 'w' * (num_layers - first)
    else:
      pattern = self.pattern
      if period is not None:
        pattern = 'w' * (period - 1) + 'f'
    if types is not None:
      letters = {'sliding_attention': 'w', 'full_attention': 'f'}
      if len(types) != num_layers or set(types) - letters.keys():
        raise config.error(
          'layer_types', f'{num_layers} of {list(letters)}', types
        )
      pattern = ''.join(letters[kind] for kind in types)
    pattern = shortest_period(pattern)
    if 'w' not in pattern:
      return {}
    return {'window': window, 'window_pattern': pattern}

  def _rotary(self, config, fields):
    length = fields['context_size']
    base = config.number('rope_theta', self.base)
    rope = config.part('rope_parameters') or config.part('rope_scaling')
    by_type = rope is not None and rope.get('full_attention') is not None
    of_full = rope.part('full_attention') if by_type else rope
    fields['attention']['rotary'] = rotary.to_fields(of_full, base, length)
    if self.window_base is None:
      return
    base = config.number('rope_local_base_freq', self.window_base)
    of_window = rope.part('sliding_attention') if by_type else None
    local = rotary.to_fields(of_window, base, length)
    if 'window' in fields:
      fields['window_attention'] = {'rotary': local}

  def to_config(self, fields: dict) -> dict:
    attention = fields['attention']
    theta, scaling = rotary.to_config(attention['rotary'])
    config = {theirs: fields[ours] for ours, theirs in _LLAMA_SIZES.items()} | {
      'num_key_value_heads': attention['num_kv_heads'],
      'head_dim': attention['key_size'],
      'max_position_embeddings': fields['context_size'],
      'tie_word_embeddings': fields['with_tied_output'],
      'rms_norm_eps': fields['norm_epsilon'],
      'rope_theta': theta,
      'rope_scaling': scaling,
    }
    if self.has_bias_key:
      config['attention_bias'] = attention['with_bias']
    if self.has_mlp_bias_key:
      config['mlp_bias'] = fields['with_feed_forward_bias']
    if self.is_gemma:
      config |= {
        'hidden_activation': _GELUS[1],
        'query_pre_attn_scalar': _integral((attention['scale'] or 1.0) ** -2),
        'final_logit_softcapping': fields['output_logit_cap'],
        'attn_logit_softcapping': attention['logit_cap'],
      }
    else:
      config['hidden_act'] = 'silu'
    if self.has_window:
      config |= self._window_config(fields)
    return config

  def _window_config(self, fields):
    letters, window = fields['window_layers'], fields['window']
    if not self.pattern:
      return {'sliding_window': window}
    kinds = {'w': 'sliding_attention', 'f': 'full_attention'}
    config = {
      'sliding_window': window or self.window,
      'layer_types': [kinds[letter] for letter in letters],
    }
    if self.pattern == 'first':
      config['use_sliding_window'] = window is not None
      config['max_window_layers'] = letters.count('f')
    if self.window_base is not None and 'w' in letters:
      local = fields['window_attention']['rotary']
      config['rope_local_base_freq'] = rotary.to_config(local)[0]
    return config


@dataclasses.dataclass(frozen=True)
class _GptOss(_Llama):
  """Llama's decoder with sinks and experts."""

  def to_fields(self, config: Config) -> dict:
    fields = super().to_fields(config)
    fields['attention']['with_sinks'] = True
    fields['experts'] = {
      'num_experts': config.count('num_local_experts', 128),
      'num_active': config.count('num_experts_per_tok', 4),
      'hidden_size': fields.pop('hidden_size'),
      'alpha': config.number('swiglu_alpha', 1.702),
      'limit': config.number('swiglu_limit', 7.0),
    }
    return fields

  def to_config(self, fields: dict) -> dict:
    experts = fields['experts'] or {}
    return super().to_config(fields) | {
      'intermediate_size': experts.get('hidden_size', 1),
      'num_local_experts': experts.get('num_experts', 1),
      'num_experts_per_tok': experts.get('num_active', 1),
      'swiglu_alpha': experts.get('alpha', 0.0),
      'swiglu_limit': experts.get('limit', 0.0),
    }


def shortest_period(pattern: str) -> str:
  """The shortest word whose repetition begins with `pattern`."""
  for size in range(1, len(pattern)):
    if (pattern[:size] * len(pattern)).startswith(pattern):
      return pattern[:size]
  return pattern


def _integral(value):
  """Undo the rounding of a square root's square."""
  near = round(value)
  return near if abs(value - near) < 1e-9 * near else value


_GEMMA2 = _Llama(
  is_gemma=True,
  with_tied_output=True,
  has_window=True,
  pattern='wf',
  head_size=256,
  num_kv_heads=4,
  context_size=8192,
  caps=(50.0, 30.0),
)


def _family(name, model_type, kind):
  return Family(
    f'{name}ForCausalLM',
    model_type,
    kind.to_fields,
    kind.to_config,
    names.llama,
  )


# In the order that `save` prefers where several express a model.
FAMILIES = (
  Family('GPT2LMHeadModel', 'gpt2', _gpt2_fields, _gpt2_config, names.gpt2),
  _family(
    'Llama',
    'llama',
    _Llama(has_mlp_bias_key=True, context_size=2048),
  ),
  _family(
    'Mistral',
    'mistral',
    _Llama(has_bias_key=False, has_window=True, num_kv_heads=8),
  ),
  _family(
    'Qwen2',
    'qwen2',
    _Llama(
      with_bias=True,
      with_output_bias=False,
      has_bias_key=False,
      has_window=True,
      pattern='first',
    ),
  ),
  _family(
    'Qwen3',
    'qwen3',
    _Llama(
      with_qk_norm=True,
      has_window=True,
      pattern='first',
      head_size=128,
    ),
  ),
  _family('Gemma2', 'gemma2', _GEMMA2),
  _family(
    'Gemma3',
    'gemma3_text',
    dataclasses.replace(
      _GEMMA2,
      with_qk_norm=True,
      pattern='wwwwwf',
      context_size=131_072,
      base=1_000_000.0,
      window_base=10_000.0,
      caps=(None, None),
    ),
  ),
  _family(
    'GptOss',
    'gpt_oss',
    _GptOss(
      with_bias=True,
      has_window=True,
      pattern='wf',
      head_size=64,
      num_kv_heads=8,
      context_size=131_072,
      window=128,
      base=150_000.0,
      epsilon=1e-5,
    ),
  ),
)


def find(config: Config) -> Family:
  """The family of a config.

  Raises:
    ValueError: the architecture is not among `FAMILIES`.
  """
  by_name = {family.architecture: family for family in FAMILIES}
  by_type = {family.model_type: family for family in FAMILIES}
  architectures = config.get('architectures') or []
  kind = config.get('model_type')
  if kind in by_type and not set(architectures) - by_name.keys():
    return by_type[kind]
  got = ', '.join(map(str, architectures)) or kind
  raise config.error('architectures', f'one of {list(by_name)}', got)
