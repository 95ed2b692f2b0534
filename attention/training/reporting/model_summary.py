"""Count a model's parameters, FLOPs and memory without building it."""

import dataclasses
import functools
import math
import re

import haiku as hk
import jax
import jax.numpy as jnp

from attention.training.optimization import gradients
from attention.training.reporting import flops, memory

# Lookup tables: they take part in no matrix product.
_TABLES = ('embeddings', 'positions')


@dataclasses.dataclass(frozen=True)
class Part:
  """A parameter, grouped over all layers with the same name and shape."""

  path: str  # layer numbers are written as 0…95
  shape: tuple[int, ...]
  count: int  # number of layers
  flops: int  # forward, per layer and token

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Heads:
  """A group of identical attention modules."""

  path: str
  count: int
  num_heads: int
  num_kv_heads: int
  key_size: int
  value_size: int
  num_keys: int
  has_output: bool  # False if each head produces the full width
  width: int  # input width
  output_size: int

  @property
  def flops(self) -> int:
    """FLOPs per token of the products with keys and values, unmasked."""
    return (
      2 * self.num_keys * self.num_heads * (self.key_size + self.value_size)
    )


def inspect(task) -> str:
  """Format a table of a model's parameters, FLOPs and memory.

  A matrix costs 2 FLOPs per parameter and token. A lookup table costs none,
  unless it is tied to the output projection. FLOPs of models of alignments are
  those of a training step. The model is only traced, so nothing is allocated.

  Args:
    task: a config's task.

  Returns:
    Lines of text.
  """
  if not getattr(task, 'is_per_token', True):
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    parts = _parts(shapes, is_tied=False)
    table = _table(parts, [], with_flops=False)
    memory_lines = _memory(parts, [], _count_trained(task, shapes))
    return '\n'.join([*table, '', *_step(task), *memory_lines])
  shapes, attentions = _trace(task)
  parts = _parts(shapes, task.model_fields.get('with_tied_output', False))
  return '\n'.join(
    [
      *_table(parts, attentions),
      *(line for heads in attentions for line in _describe(heads, parts)),
      '',
      *_memory(parts, attentions, _count_trained(task, shapes)),
    ]
  )


def _trace(task):
  """Trace the model; returns its parameter shapes and its `Heads` groups."""
  widths, found = [], []
  zeros = functools.cache(jnp.zeros)

  def watch(call, args, kwargs, context):
    module, method = context.module, context.method_name
    if not hasattr(module, 'attend') or method not in ('__call__', 'attend'):
      return call(*args, **kwargs)
    if method == '__call__':
      widths.append(args[0].shape[-1])
      output = call(*args, **kwargs)
      path, *sizes = found.pop()
      leaf = output[0] if isinstance(output, tuple) else output
      found.append((path, *sizes, widths.pop(), leaf.shape[-1]))
      return output
    query, key, value = args
    found.append(
      (
        module.module_name,
        query.shape[-2],
        key.shape[-2],
        key.shape[-1],
        value.shape[-1],
        key.shape[-3],
        getattr(module, 'value_factorisation', None) != 'full',
      )
    )
    if hasattr(module, 'compare'):
      module.compare(query, key)  # creates parameters of the similarity
    # Skip the computation: only the shape of the result matters.
    return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype)

  def create(call, shape, dtype, init, context):
    del call, init, context  # tracing initialisers dominates the time
    return zeros(tuple(shape), dtype)

  def cheaply(call, args, kwargs, context):
    if context.method_name == '__init__':
      return call(*args, **kwargs)
    with hk.custom_creator(create):
      return call(*args, **kwargs)

  with hk.intercept_methods(cheaply), hk.intercept_methods(watch):
    shapes = jax.eval_shape(task.init, jax.random.key(0))
  groups = {}
  for path, *sizes in found:
    groups.setdefault((_anonymous(path), *sizes), []).append(path)
  return shapes, [
    Heads(_span(paths), len(paths), *sizes)
    for (_, *sizes), paths in groups.items()
  ]


def _parts(params, is_tied) -> list[Part]:
  groups = {}
  for module, leaf, shape in hk.data_structures.traverse(params):
    path = f'{module}/{leaf}'
    groups.setdefault((_anonymous(path), shape.shape), []).append(path)
  parts = []
  for (_, shape), paths in groups.items():
    leaf = paths[0].split('/')[-1]
    is_used = len(shape) > 1 and (
      leaf not in _TABLES or (is_tied and leaf == 'embeddings')
    )
    cost = 2 * math.prod(shape) if is_used else 0
    parts.append(Part(_span(paths), shape, len(paths), cost))
  return parts


def _anonymous(path):
  return re.sub(r'_\d+(?=/|$)', '_#', path)


def _span(paths):
  """Merge block_0/w, block_1/w, … into block_0…95/w."""
  numbers = [
    int(n.group(1)) for p in paths if (n := re.search(r'_(\d+)(?=/|$)', p))
  ]
  if len(set(numbers)) < 2:
    return paths[0]
  span = f'_{min(numbers)}…{max(numbers)}'
  return re.sub(r'_\d+(?=/|$)', span, paths[0], count=1)


def _table(parts, attentions, with_flops=True):
  rows = [('part', 'shape', 'each', 'layers', 'parameters', 'FLOPs/token')]
  rows += [
    (
      part.path,
      ' × '.join(map(str, part.shape)),
      f'{part.size:,}',
      str(part.count),
      f'{part.count * part.size:,}',
      f'{part.count * part.flops:,}',
    )
    for part in parts
  ]
  rows += [
    (
      f'{heads.path} over {heads.num_keys} keys',
      '',
      '',
      str(heads.count),
      '',
      f'{heads.count * heads.flops:,}',
    )
    for heads in attentions
  ]
  total = sum(p.count * p.size for p in parts)
  cost = sum(x.count * x.flops for x in (*parts, *attentions))
  rows += [('total', '', '', '', f'{total:,}', f'{cost:,}')]
  if not with_flops:
    rows = [row[:-1] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for path, *cells in rows:
    right = [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
    yield '  '.join([path.ljust(widths[0]), *right])


def _describe(heads, parts):
  """Format the parameter counts of a group of heads, without biases."""
  width, size = heads.width, heads.key_size
  query, key = (width * size,) * 2
  value = width * heads.value_size
  output = heads.value_size * heads.output_size * heads.has_output
  one = query + key + value + output
  layer = heads.num_heads * (query + output) + heads.num_kv_heads * (
    key + value
  )
  full = width * heads.output_size
  total = sum(p.count * p.size for p in parts)
  rows = [
    ('query, per head', f'{width} × {size}', query),
    ('key, per head', f'{width} × {size}', key),
    ('value, per head', f'{width} × {heads.value_size}', value),
    ('output, per head', f'{heads.value_size} × {heads.output_size}', output),
    ('one head, all matrices', '', one),
    (f'{heads.num_heads} heads, per layer', '', layer),
    (f'{heads.count} layers', '', heads.count * layer),
    (
      'full-rank value map, per head',
      f'{width} × {heads.output_size}',
      full,
    ),
    ('factorised as value × output', '', value + output),
  ]
  if not heads.has_output:
    del rows[3], rows[-1]
  yield ''
  yield f'{heads.path}, weight matrices (biases not counted)'
  for name, shape, number in rows:
    yield f'  {name:<32}{shape:>16}{number:>20,}'
  share = heads.count * layer / total
  yield (
    f'  {heads.count * layer:,} of {total:,} parameters ({share:.1%} of '
    f'{_round(total)})'
  )


def _step(task):
  count = flops.count_step(task, task.batch(0))
  yield f'model FLOPs of a training step {count:>26,}'
  yield ''


def _count_trained(task, shapes):
  trained, _ = gradients.partition(task, shapes)
  return sum(math.prod(x.shape) for x in jax.tree.leaves(trained))


def _memory(parts, attentions, trained):
  total = sum(p.count * p.size for p in parts)
  cache = sum(
    h.count * h.num_kv_heads * (h.key_size + h.value_size) for h in attentions
  )
  if trained < total:
    yield f'trained parameters {trained:>38,} ({trained / total:.2%})'
    yield ''
  yield 'memory, float32'
  for name, count in (
    ('parameters', total),
    ('training: with gradients and two moments', total + 3 * trained),
    *([('key and value cache, per token', cache)] if attentions else []),
  ):
    yield f'  {name:<42}{memory.format_bytes(4 * count):>14}'


def _round(count):
  for size, name in ((1e9, 'billion'), (1e6, 'million'), (1e3, 'thousand')):
    if count >= size:
      return f'{count / size:.3g} {name}'
  return str(count)
