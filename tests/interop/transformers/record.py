"""Records what transformers computes, for tests that do without it.

  python tests/interop/transformers/record.py

Each file of tests/golden/transformers holds a model's config and the shapes of
its weights, whose values `weights` makes; logits at some positions;
of the gradient of the mean loss, each tensor's norm and its product with the
tensor; and 30 greedy tokens after two prompts of different lengths, the shorter
one padded on the left. Recorded with transformers 5.24 and PyTorch 2.13 on CPU.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from conftest import GOLDEN, weights

_LLAMA = dict(
  vocab_size=211,
  hidden_size=120,
  intermediate_size=168,
  num_hidden_layers=5,
  num_attention_heads=12,
  num_key_value_heads=3,
  max_position_embeddings=64,
)
_YARN = {
  'rope_type': 'yarn',
  'rope_theta': 1e6,
  'factor': 4.0,
  'original_max_position_embeddings': 16,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 5e5,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 16,
}
# Configs by name: the class of transformers and its arguments.
_CONFIGS = {
  'gpt2': (
    'GPT2Config',
    dict(vocab_size=211, n_embd=120, n_layer=5, n_head=12, n_positions=64),
  ),
  'llama': ('LlamaConfig', dict(_LLAMA, rope_parameters=_LLAMA3)),
  'llama_biased': (
    'LlamaConfig',
    dict(
      _LLAMA,
      attention_bias=True,
      mlp_bias=True,
      tie_word_embeddings=True,
      head_dim=14,
    ),
  ),
  'mistral': ('MistralConfig', dict(_LLAMA, sliding_window=7, head_dim=14)),
  'qwen2': (
    'Qwen2Config',
    dict(
      _LLAMA, use_sliding_window=True, sliding_window=7, max_window_layers=3
    ),
  ),
  'qwen3': ('Qwen3Config', dict(_LLAMA, head_dim=14, rope_parameters=_YARN)),
  'gemma2': (
    'Gemma2Config',
    dict(_LLAMA, head_dim=14, sliding_window=7, query_pre_attn_scalar=17),
  ),
  'gemma3': (
    'Gemma3TextConfig',
    dict(
      _LLAMA,
      head_dim=14,
      sliding_window=7,
      sliding_window_pattern=3,
      query_pre_attn_scalar=17,
      rope_parameters={
        'full_attention': {
          'rope_type': 'linear',
          'factor': 8.0,
          'rope_theta': 1e6,
        },
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
      },
    ),
  ),
  'gpt_oss': (
    'GptOssConfig',
    dict(
      _LLAMA,
      head_dim=14,
      sliding_window=7,
      num_local_experts=4,
      num_experts_per_tok=2,
    ),
  ),
}


def _record(name, kind, arguments):
  config = getattr(transformers, kind)(**arguments)
  config._attn_implementation = 'eager'
  network = transformers.AutoModelForCausalLM.from_config(config).eval()
  parameters = dict(network.named_parameters())
  shapes = {key: tuple(x.shape) for key, x in parameters.items()}
  with torch.no_grad():
    for key, array in weights(shapes).items():
      parameters[key].copy_(torch.from_numpy(array))
  with tempfile.TemporaryDirectory() as folder:
    network.save_pretrained(folder)
    text = (pathlib.Path(folder) / 'config.json').read_text()
  rng = np.random.RandomState(1)
  tokens = torch.from_numpy(rng.randint(0, 211, (2, 23)))
  logits = network(tokens).logits
  loss = torch.nn.functional.cross_entropy(
    logits[:, :-1].reshape(-1, 211), tokens[:, 1:].reshape(-1)
  )
  loss.backward()
  gradients = {
    key: [x.grad.norm().item(), (x.grad * x).sum().item()]
    for key, x in parameters.items()
  }
  prompts = torch.from_numpy(rng.randint(3, 211, (2, 9)))
  mask = torch.ones_like(prompts)
  prompts[1, :4] = mask[1, :4] = 0
  # eos_token_id is out of reach, so that nothing ends early.
  generated = network.generate(
    prompts,
    attention_mask=mask,
    max_new_tokens=30,
    do_sample=False,
    eos_token_id=None,
    pad_token_id=0,
  )
  np.savez_compressed(
    GOLDEN / f'{name}.npz',
    config=text,
    shapes=json.dumps(shapes),
    tokens=tokens.numpy(),
    logits=logits[:, [0, 6, 7, 8, 15, 22]].detach().numpy(),
    loss=loss.item(),
    gradients=json.dumps(gradients),
    prompts=prompts.numpy(),
    generated=generated[:, 9:].numpy(),
  )
  print(name, f'{loss.item():.4f}')


if __name__ == '__main__':
  GOLDEN.mkdir(exist_ok=True)
  for name, (kind, arguments) in _CONFIGS.items():
    _record(name, kind, arguments)
