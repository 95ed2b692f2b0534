"""Compare training steps of a small GPT to PyTorch, on the CPU.

  python benchmarks/train_gpt.py [--rounds=9] [--config=configs/gpt_char.py]

Both sides use the same sizes, the same batches, AdamW with the same schedule,
and clipping by global norm. Ours is in float32, and with the products of layers
in bfloat16. The peers, in float32, are a plain nn.Module with
scaled_dot_product_attention, run eagerly and by torch.compile from the same
initial parameters as ours, and transformers' GPT2LMHeadModel with its own. All
take turns in one process, several steps at a time. The table shows medians over
the rounds, medians of the per-round ratios, and the mean loss of the last 100
steps or, if there are fewer, of all.
"""

# ruff: noqa: E402
import sys

# Without this, attention.py beside this script would shadow the library.
del sys.path[0]

import argparse
import collections
import copy
import statistics
import time

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from attention.training import command_line, tasks
from attention.training.calls import Calls
from attention.training.optimization import optimizers, precision
from attention.training.optimization.step import Step
from attention.training.training_config import TrainingConfig


def ours(task, config, policy=''):
  """Make our training, as a function of the first step and their number."""
  settings = TrainingConfig.create(
    config.training.to_dict() | {'precision': policy}
  )
  step = Step.create(config, settings, task)
  state, calls = step.init(), Calls(task, settings)

  def run(first, count):
    nonlocal state
    losses, n = [], first
    while n < first + count:
      batches = calls.batches(n)[: first + count - n]
      stacked = step.stack(batches)
      with precision.applied(policy):
        program = step.compile(stacked).result()
      state, metrics = step.run(program, state, stacked, n, len(batches))
      losses.append((metrics['train/loss'], len(batches)))
      n += len(batches)
    return [
      x for loss, count in losses for x in np.asarray(loss)[:count].tolist()
    ]

  return run


class Block(nn.Module):
  def __init__(self, width, heads):
    super().__init__()
    self.heads = heads
    self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
    self.qkv = nn.Linear(width, 3 * width)
    self.linear = nn.Linear(width, width)
    self.expand = nn.Linear(width, 4 * width)
    self.contract = nn.Linear(4 * width, width)

  def forward(self, x):
    b, t, m = x.shape
    qkv = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    y = nn.functional.scaled_dot_product_attention(
      query, key, value, is_causal=True
    )
    x = x + self.linear(y.transpose(1, 2).reshape(b, t, m))
    hidden = self.expand(self.norms[1](x))
    return x + self.contract(nn.functional.gelu(hidden, approximate='tanh'))


class Plain(nn.Module):
  def __init__(self, vocab, model):
    super().__init__()
    width = model.model_size
    self.tokens = nn.Embedding(vocab, width)
    self.positions = nn.Parameter(torch.randn(model.context_size, width) * 0.02)
    self.blocks = nn.Sequential(
      *(Block(width, model.num_heads) for _ in range(model.num_layers))
    )
    self.norm = nn.LayerNorm(width)
    nn.init.normal_(self.tokens.weight, std=0.02)

  def forward(self, tokens):
    x = self.blocks(self.tokens(tokens) + self.positions)
    return self.norm(x) @ self.tokens.weight.T

  def load(self, params):
    """Copy the parameters of our model."""
    final, tokens = params['gpt/final_norm'], params['gpt/tokens']
    pairs = [(self.norm, final)]
    for i, block in enumerate(self.blocks):
      ours = {
        name.removeprefix(f'gpt/block_{i}/'): leaves
        for name, leaves in params.items()
      }
      pairs += [
        (block.norms[0], ours['attention_norm']),
        (block.norms[1], ours['feed_forward_norm']),
        (block.qkv, ours['attention/qkv']),
        (block.linear, ours['attention/linear']),
        (block.expand, ours['expand']),
        (block.contract, ours['contract']),
      ]
    with torch.no_grad():
      self.tokens.weight.copy_(_tensor(tokens['embeddings']))
      self.positions.copy_(_tensor(params['gpt']['positions']))
      for module, leaves in pairs:
        is_norm = 'scale' in leaves
        module.weight.copy_(
          _tensor(leaves['scale'] if is_norm else leaves['w'].T)
        )
        module.bias.copy_(_tensor(leaves['offset' if is_norm else 'b']))


def _tensor(x):
  return torch.from_numpy(np.array(x))


def gpt2(vocab, model):
  config = transformers.GPT2Config(
    vocab_size=vocab,
    n_positions=model.context_size,
    n_embd=model.model_size,
    n_layer=model.num_layers,
    n_head=model.num_heads,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    use_cache=False,
  )
  network = transformers.GPT2LMHeadModel(config)
  return network, lambda tokens: network(tokens).logits


def peer(task, config, network, forward):
  """Make a peer's training, as a function like that of `ours`."""
  settings = config.optimizer
  decayed = [p for p in network.parameters() if p.ndim > 1]
  others = [p for p in network.parameters() if p.ndim <= 1]
  optimizer = torch.optim.AdamW(
    [
      {'params': decayed, 'weight_decay': settings.weight_decay},
      {'params': others, 'weight_decay': 0.0},
    ],
    lr=settings.learning_rate,
    betas=(settings.b1, settings.b2),
    fused=True,
  )
  _, schedule = optimizers.adamw(steps=config.training.steps, **settings)
  rates = np.asarray(jax.vmap(schedule)(np.arange(config.training.steps + 1)))

  def train_step(n):
    batch = {
      k: torch.from_numpy(np.array(v, np.int64))
      for k, v in task.batch(n).items()
    }
    optimizer.zero_grad(set_to_none=True)
    logits = forward(batch['tokens'])
    loss = nn.functional.cross_entropy(
      logits.flatten(0, 1), batch['targets'].flatten()
    )
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
    for group in optimizer.param_groups:
      group['lr'] = float(rates[min(n + 1, len(rates) - 1)])
    optimizer.step()
    return loss.item()

  return lambda first, count: [train_step(first + i) for i in range(count)]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument(
    '--steps', type=int, default=50, help='per round and peer'
  )
  parser.add_argument('--config', default='configs/gpt_char.py')
  parser.add_argument(
    '--data', default='', help="text file (default: config's)"
  )
  arguments = parser.parse_args()
  config = command_line.load_config(arguments.config)
  config.data.path = arguments.data
  jax.config.update('jax_num_cpu_devices', config.training.cpu_devices)

  task = tasks.create(config)
  vocab = task.vocabulary.size
  plain = Plain(vocab, config.model)
  plain.load(jax.jit(task.init)(jax.random.key(config.seed)))
  compiled = copy.deepcopy(plain)
  contestants = {
    'attention': ours(task, config),
    'attention, products in bfloat16': ours(task, config, 'products=bfloat16'),
    'PyTorch, plain module': peer(task, config, plain, plain),
    'the same, compiled': peer(task, config, compiled, torch.compile(compiled)),
    'transformers, GPT2LMHeadModel': peer(
      task, config, *gpt2(vocab, config.model)
    ),
  }
  times = {name: [] for name in contestants}
  losses = {name: collections.deque(maxlen=100) for name in contestants}
  for n in range(arguments.rounds + 1):  # the first round is a warm-up
    for name, advance in contestants.items():
      start = time.perf_counter()
      losses[name].extend(advance(n * arguments.steps, arguments.steps))
      seconds = (time.perf_counter() - start) / arguments.steps
      if n:
        times[name].append(seconds)

  tokens = task.tokens_per_step
  table = Table('', 'ms per step', 'tokens/s', 'time / ours', 'loss')
  for name, seconds in times.items():
    median = statistics.median(seconds)
    ratios = [a / b for a, b in zip(seconds, times['attention'], strict=True)]
    table.add_row(
      name,
      f'{median * 1e3:.1f}',
      f'{tokens / median:,.0f}',
      f'{statistics.median(ratios):.2f}',
      f'{statistics.mean(losses[name]):.4f}',
    )
  versions = f'jax {jax.__version__}, torch {torch.__version__}'
  table.caption = f'{versions}, {torch.get_num_threads()} threads'
  Console().print(table)


if __name__ == '__main__':
  main()
