"""Compare greedy decoding to transformers, on the CPU or a GPU.

  python benchmarks/decode.py [--size=gpt|llama|llama8b] [--rounds=7] \\
    [--batch_sizes=1,16] [--dtypes=float32,bfloat16] [--weights] \\
    [--recompute] [--no_peers]

The models generate tokens after a prompt of 64: a GPT of 10.7 M parameters (6
layers, 6 heads, width 384, vocabulary of 65) 256 tokens, a Llama of 125 M
parameters (12 layers, 12 heads, 4 key heads, width 768, vocabulary of 32,000)
64 tokens, and one of 8.0 B parameters (Llama 3's shape, which needs a GPU and
--dtypes=bfloat16) 64 tokens. The peers are transformers' `generate` with its
cache, on the same weights in float32 and bfloat16 (--no_peers omits them), and
our own model without a cache (--recompute), and with activations in float32 and
the weights of layers in bfloat16 (--weights). The peers' tokens are compared
with ours. All take turns in one process. The table shows medians over the
rounds, and medians of the per-round ratios.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import functools
import statistics
import tempfile
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from attention import decoding, models
from attention.interop import transformers as interop
from attention.models.gpt import window_step
from attention.modules import layers
from attention.ops.cache import Cache

PROMPT = 64
NEW = {'gpt': 256, 'llama': 64, 'llama8b': 64}
DEVICE = 'cuda' if jax.default_backend() == 'gpu' else 'cpu'
LLAMA = dict(
  positions='rotary',
  norm_kind='rms',
  activation='swiglu',
  with_feed_forward_bias=False,
  fused_qkv=False,
)
LLAMA_ATTENTION = dict(
  with_bias=False, with_output_bias=False, rotary=dict(pairs='halves')
)
FIELDS = {
  'gpt': dict(
    vocab_size=65,
    context_size=PROMPT + NEW['gpt'],
    num_layers=6,
    num_heads=6,
    model_size=384,
  ),
  'llama': dict(
    vocab_size=32_000,
    context_size=PROMPT + NEW['llama'],
    num_layers=12,
    num_heads=12,
    model_size=768,
    hidden_size=2944,
    attention=LLAMA_ATTENTION | dict(num_kv_heads=4),
    **LLAMA,
  ),
  'llama8b': dict(
    vocab_size=128_256,
    context_size=PROMPT + NEW['llama8b'],
    num_layers=32,
    num_heads=32,
    model_size=4096,
    hidden_size=14_336,
    with_tied_output=False,
    attention=LLAMA_ATTENTION | dict(num_kv_heads=8),
    **LLAMA,
  ),
}


def our_model(fields, dtype):
  """Create our model and parameters, which are the same in every dtype."""
  model = hk.without_apply_rng(
    hk.transform(
      lambda tokens, **more: models.create('gpt', **fields)(tokens, **more)
    )
  )

  @jax.jit
  def init(key):
    params = model.init(key, np.zeros((1, 2), int))
    # Scaled up, so that the most likely token is unambiguous.
    return jax.tree.map(lambda p: (p * 3).astype(dtype), params)

  return model, init(jax.random.key(0))


def ours(model, params, prompt, new):
  """Compile greedy decoding with a cache; returns (program, inputs)."""

  @jax.jit
  def decode(params, prompt):
    def step(tokens, cache):
      logits, cache = model.apply(params, tokens, cache=cache, num_logits=1)
      return logits[:, 0], cache

    cache = Cache.create(PROMPT + new - 1)
    return decoding.greedy(step, cache, prompt, new)

  return decode.lower(params, prompt).compile(), (params, prompt)


def recomputing(model, params, prompt, new):
  """Compile decoding without a cache, which reruns the whole sequence."""

  @jax.jit
  def decode(params, prompt):
    size = PROMPT + new
    step, (window, length) = window_step(model.apply, params, size)
    window = jnp.repeat(window, len(prompt), axis=0)
    return decoding.greedy(step, (window, length), prompt, new)

  return decode.lower(params, prompt).compile(), (params, prompt)


def peer(fields, params, dtype):
  """Create transformers' model with our parameters."""
  with tempfile.TemporaryDirectory() as folder:
    interop.save(folder, fields, params)
    return (
      transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
      )
      .eval()
      .to(DEVICE)
    )


def generate(network, prompt, new):
  prompt = torch.from_numpy(np.array(prompt, np.int64)).to(DEVICE)
  with torch.inference_mode():
    tokens = network.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=new,
      do_sample=False,
      use_cache=True,
      pad_token_id=0,
    )
  return tokens[:, PROMPT:].cpu().numpy()


def describe_memory(compiled, fields, batch_size, itemsize):
  """Format the size of the cache, and of all temporaries."""
  heads = fields['num_heads']
  kv_heads = fields.get('attention', {}).get('num_kv_heads', heads)
  size = fields['model_size'] * kv_heads // heads * fields['context_size']
  cache = 2 * fields['num_layers'] * batch_size * size * itemsize
  memory = compiled.memory_analysis()
  return (
    f'batch {batch_size}: cache {cache / 2**20:.1f} MiB (from its shapes), all '
    f'temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--size', choices=FIELDS, default='gpt')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--batch_sizes', default='1,16')
  parser.add_argument(
    '--recompute', action='store_true', help='include decoding without a cache'
  )
  parser.add_argument(
    '--weights', action='store_true', help='include weights in bfloat16'
  )
  parser.add_argument(
    '--no_peers', action='store_true', help='omit transformers'
  )
  parser.add_argument('--dtypes', default='float32,bfloat16')
  arguments = parser.parse_args()
  fields, new = FIELDS[arguments.size], NEW[arguments.size]
  dtypes = arguments.dtypes.split(',')
  weights = {}
  for dtype in dtypes:
    model, weights[dtype] = our_model(fields, dtype)
  params = weights[dtypes[0]]
  count = sum(p.size for p in jax.tree.leaves(params))
  peers = [] if arguments.no_peers else dtypes
  networks = {dtype: peer(fields, params, dtype) for dtype in peers}
  console = Console()
  table = Table('batch', '', 'tokens/s', 'time ratio to first', 'tokens')
  for batch_size in map(int, arguments.batch_sizes.split(',')):
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, fields['vocab_size'], (batch_size, PROMPT))
    contestants = {}
    for dtype in dtypes:
      compiled, inputs = ours(model, weights[dtype], prompt, new)
      contestants[f'attention, {dtype}'] = functools.partial(compiled, *inputs)
      itemsize = jnp.dtype(dtype).itemsize
      console.print(
        dtype, describe_memory(compiled, fields, batch_size, itemsize)
      )
    if arguments.weights:
      small = layers.cast_weights(weights[dtypes[0]], jnp.bfloat16)
      compiled, inputs = ours(model, small, prompt, new)
      contestants['weights in bfloat16'] = functools.partial(compiled, *inputs)
    for dtype, network in networks.items():
      contestants[f'transformers, {dtype}'] = functools.partial(
        generate, network, prompt, new
      )
    if arguments.recompute:
      compiled, inputs = recomputing(model, params, prompt, new)
      contestants['recomputing'] = functools.partial(compiled, *inputs)
    times, tokens = {name: [] for name in contestants}, {}
    for n in range(arguments.rounds + 1):  # the first round is a warm-up
      for name, decode in contestants.items():
        start = time.perf_counter()
        tokens[name] = np.asarray(decode())
        seconds = time.perf_counter() - start
        if n:
          times[name].append(seconds)
    first = next(iter(times))
    for name, seconds in times.items():
      ratios = [a / b for a, b in zip(seconds, times[first], strict=True)]
      same = (tokens[name] == tokens[first]).mean()
      table.add_row(
        str(batch_size),
        name,
        f'{batch_size * new / statistics.median(seconds):,.0f}',
        f'{statistics.median(ratios):.2f}',
        f'{same:.1%} identical',
      )
  versions = f'jax {jax.__version__}, torch {torch.__version__}'
  versions += f', transformers {transformers.__version__}'
  place = f'{torch.get_num_threads()} threads'
  if DEVICE == 'cuda':
    place = jax.devices()[0].device_kind
  table.caption = f'{count / 1e6:,.1f} M parameters; {versions}; {place}'
  console.print(table)


if __name__ == '__main__':
  main()
