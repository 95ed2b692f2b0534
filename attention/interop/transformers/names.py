"""Names of parameters: {(module, name) of GPT: where a file stores it}."""

from attention.interop.transformers.weights import Stored

_NORM = {'scale': 'weight', 'offset': 'bias'}
_LINEAR = {'w': 'weight', 'b': 'bias'}
_GPT2 = {
  'attention_norm': ('ln_1', _NORM),
  'attention/qkv': ('attn.c_attn', _LINEAR),
  'attention/linear': ('attn.c_proj', _LINEAR),
  'feed_forward_norm': ('ln_2', _NORM),
  'expand': ('mlp.c_fc', _LINEAR),
  'contract': ('mlp.c_proj', _LINEAR),
}
_LLAMA = {
  'attention/query': 'self_attn.q_proj',
  'attention/key': 'self_attn.k_proj',
  'attention/value': 'self_attn.v_proj',
  'attention/linear': 'self_attn.o_proj',
  'expand': 'mlp.up_proj',
  'gate': 'mlp.gate_proj',
  'contract': 'mlp.down_proj',
  'experts/router': 'mlp.router',
}
_LLAMA_NORMS = {
  'attention_norm': 'input_layernorm',
  'feed_forward_norm': 'post_attention_layernorm',
  'attention/query_norm': 'self_attn.q_norm',
  'attention/key_norm': 'self_attn.k_norm',
}
_GEMMA_NORMS = _LLAMA_NORMS | {
  'attention_post_norm': 'post_attention_layernorm',
  'feed_forward_norm': 'pre_feedforward_layernorm',
  'feed_forward_post_norm': 'post_feedforward_layernorm',
}
# In a matrix of gpt-oss, the gate's and the other columns alternate.
_EXPERTS = {
  'gate_w': ('gate_up_proj', 0),
  'expand_w': ('gate_up_proj', 1),
  'gate_b': ('gate_up_proj_bias', 0),
  'expand_b': ('gate_up_proj_bias', 1),
  'contract_w': ('down_proj', None),
  'contract_b': ('down_proj_bias', None),
}


def gpt2(fields: dict) -> dict:
  """GPT-2's names; its matrices have our orientation."""
  found = {
    ('gpt/tokens', 'embeddings'): Stored('transformer.wte.weight'),
    ('gpt', 'positions'): Stored('transformer.wpe.weight'),
    ('gpt/output', 'w'): Stored('lm_head.weight', is_transposed=True),
  }
  modules = {'gpt/final_norm': ('ln_f', _NORM)} | {
    f'gpt/block_{i}/{ours}': (f'h.{i}.{theirs}', leaves)
    for i in range(fields['num_layers'])
    for ours, (theirs, leaves) in _GPT2.items()
  }
  for module, (theirs, leaves) in modules.items():
    for ours, leaf in leaves.items():
      found[module, ours] = Stored(f'transformer.{theirs}.{leaf}')
  return found


def llama(fields: dict) -> dict:
  """Llama's names, and those of the decoders derived from it."""
  found = {
    ('gpt/tokens', 'embeddings'): Stored('model.embed_tokens.weight'),
    ('gpt/final_norm', 'scale'): Stored('model.norm.weight'),
    ('gpt/output', 'w'): Stored('lm_head.weight', is_transposed=True),
  }
  norms = _GEMMA_NORMS if fields.get('norm') == 'both' else _LLAMA_NORMS
  for i in range(fields['num_layers']):
    ours, theirs = f'gpt/block_{i}', f'model.layers.{i}'
    for name, key in norms.items():
      found[f'{ours}/{name}', 'scale'] = Stored(f'{theirs}.{key}.weight')
    for name, key in _LLAMA.items():
      path = f'{theirs}.{key}'
      found[f'{ours}/{name}', 'w'] = Stored(f'{path}.weight', True)
      found[f'{ours}/{name}', 'b'] = Stored(f'{path}.bias')
    found[f'{ours}/attention', 'sinks'] = Stored(f'{theirs}.self_attn.sinks')
    for name, (key, column) in _EXPERTS.items():
      found[f'{ours}/experts', name] = Stored(
        f'{theirs}.mlp.experts.{key}', column=column
      )
  return found
