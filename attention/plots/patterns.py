"""Attention patterns as pictures, each a matplotlib `Figure`."""

import re

import numpy as np
from matplotlib.figure import Figure

_COLOURS = 'Blues'
_VISIBLE = {' ': '␣', '\n': '⏎', '\t': '⇥', '\r': '␍', '': '∅'}


def rows(patterns) -> list[tuple[str, np.ndarray]]:
  """Patterns by layer: (label, [h, q, k]), in the order of the layers' numbers.

  Args:
    patterns: by module path, as `attention.capture` returns them. Leading axes
      (layers of a stack, members of a batch) become rows of their own.

  Raises:
    ValueError: no pattern, or one of fewer than three axes.
  """
  if not patterns:
    raise ValueError('patterns: expected at least one, got none')
  found = []
  for path in sorted(patterns, key=_natural):
    array = np.asarray(patterns[path], np.float32)
    if array.ndim < 3:
      raise ValueError(
        f'patterns: expected [..., h, q, k] at {path!r}, got {array.shape}'
      )
    leading = array.shape[:-3]
    for index in np.ndindex(leading):
      # An axis of one says nothing.
      numbers = [i for i, n in zip(index, leading, strict=True) if n > 1]
      label = path + ''.join(f'[{i}]' for i in numbers)
      found.append((label, array[index]))
  return found


def pattern_grid(patterns, *, head_numbers=None) -> Figure:
  """All patterns at once: a row a layer, a column a head.

  Args:
    patterns: by module path, see `rows`.
    head_numbers: what to call the heads; 0, 1, … by default.

  Raises:
    ValueError: see `rows`.
  """
  layers = rows(patterns)
  num_heads = max(len(heads) for _, heads in layers)
  shape = (len(layers), num_heads)
  figure = Figure(
    figsize=(1.5 * num_heads + 1, 1.5 * len(layers) + 0.6), layout='constrained'
  )
  grid = figure.subplots(*shape, squeeze=False)
  largest = max(heads.max() for _, heads in layers)
  for (label, heads), panels in zip(layers, grid, strict=True):
    for number, axes in enumerate(panels):
      axes.set(xticks=[], yticks=[])
      if number >= len(heads):
        axes.axis('off')
        continue
      image = axes.imshow(
        heads[number], vmin=0, vmax=largest, cmap=_COLOURS, aspect='auto'
      )
    # The path's end tells layers apart; all of it would not fit.
    panels[0].set_ylabel('\n'.join(label.split('/')[-2:]), fontsize=7)
  for number, axes in enumerate(grid[0]):
    name = number if head_numbers is None else head_numbers[number]
    axes.set_title(f'head {name}', fontsize=8)
  style = {'fontsize': 8, 'color': '0.5'}
  figure.supylabel('query', **style)
  figure.supxlabel('key', **style)
  figure.colorbar(image, ax=grid, label='weight', shrink=min(1, 3 / len(grid)))
  return figure


def pattern(
  weights, queries=None, keys=None, *, queries_as='rows', title=''
) -> Figure:
  """One pattern, tokens on both axes.

  Args:
    weights: [q, k].
    queries: a label a query; numbers by default.
    keys: a label a key; `queries` by default, if there are as many.
    queries_as: 'rows', or 'columns': each column then sums to 1.
    title: such as the layer and the head.

  Raises:
    ValueError: labels that don't fit the weights, or another `queries_as`.
  """
  weights, queries, keys = _check(weights, queries, keys)
  if queries_as not in ('rows', 'columns'):
    raise ValueError(
      f"queries_as: expected 'rows' or 'columns', got {queries_as!r}"
    )
  down, across, names = queries, keys, ('query', 'key')
  if queries_as == 'columns':
    weights, down, across, names = weights.T, keys, queries, ('key', 'query')
  size = [min(16, max(3.2, 0.22 * len(x) + 1.2)) for x in (across, down)]
  figure = Figure(figsize=(size[0] + 1, size[1]), layout='constrained')
  axes = figure.subplots()
  image = axes.imshow(weights, vmin=0, cmap=_COLOURS, aspect='auto')
  style = {'fontsize': 8, 'parse_math': False}
  axes.set_xticks(range(len(across)), across, rotation=90, **style)
  axes.set_yticks(range(len(down)), down, **style)
  axes.set(ylabel=names[0], xlabel=names[1])
  figure.colorbar(image, label='weight')
  _entitle(figure, title)
  return figure


def flow(weights, queries=None, keys=None, *, title='') -> Figure:
  """Queries above, keys below, a line between them as wide as the weight.

  Args, Raises: as `pattern`.
  """
  weights, queries, keys = _check(weights, queries, keys)
  longest = max(len(queries), len(keys))
  figure = Figure(
    figsize=(min(24, max(4, 0.3 * longest + 1)), 3.2), layout='constrained'
  )
  axes = figure.subplots()
  # Both rows fill the width.
  top = np.linspace(0, 1, len(queries) + 2)[1:-1]
  bottom = np.linspace(0, 1, len(keys) + 2)[1:-1]
  for q, k in np.argwhere(weights > 0.02):
    axes.plot(
      [top[q], bottom[k]],
      [1, 0],
      color='C0',
      linewidth=5 * weights[q, k],
      alpha=min(1.0, 0.15 + 0.85 * float(weights[q, k])),
      solid_capstyle='round',
    )
  style = {'ha': 'center', 'fontsize': 9, 'parse_math': False}
  for x, label in zip(top, queries, strict=True):
    axes.text(x, 1.04, label, va='bottom', **style)
  for x, label in zip(bottom, keys, strict=True):
    axes.text(x, -0.04, label, va='top', **style)
  axes.text(0, 1.04, 'query', va='bottom', ha='right', color='0.5')
  axes.text(0, -0.04, 'key', va='top', ha='right', color='0.5')
  axes.set(xlim=(0, 1), ylim=(-0.12, 1.12))
  axes.axis('off')
  _entitle(figure, title)
  return figure


def _entitle(figure, title):
  if title:
    # A path may be longer than a small picture is wide: it wraps.
    figure.suptitle(title, fontsize=9, wrap=True, parse_math=False)


def _check(weights, queries, keys):
  """The weights, and labels that can be seen."""
  weights = np.asarray(weights, np.float32)
  if weights.ndim != 2:
    raise ValueError(f'weights: expected [q, k], got shape {weights.shape}')
  num_queries, num_keys = weights.shape
  if queries is None:
    queries = list(map(str, range(num_queries)))
  if keys is None:
    is_self = num_queries == num_keys
    keys = queries if is_self else list(map(str, range(num_keys)))
  for name, labels, count in (
    ('queries', queries, num_queries),
    ('keys', keys, num_keys),
  ):
    if len(labels) != count:
      raise ValueError(
        f'{name}: expected {count} labels, as weights {weights.shape} say, '
        f'got {len(labels)}'
      )
  return weights, visible(queries), visible(keys)


def visible(tokens) -> list[str]:
  """Tokens as labels: white space is shown."""
  return [
    ''.join(_VISIBLE.get(s, s) for s in str(token)) or _VISIBLE['']
    for token in tokens
  ]


def _natural(path):
  """Sorts block_10 behind block_2."""
  return [
    (1, int(part), '') if part.isdigit() else (0, 0, part)
    for part in re.split(r'(\d+)', path)
  ]
