"""Plots of attention patterns as matplotlib `Figure`s."""

import re

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 150  # of figures that are saved
_MAX_LABELS = 16  # tokens that label a panel of a grid; numbers above
_LONGEST_NAME = 24  # characters beside a panel of a grid
_COLOURS = 'Blues'
_VISIBLE = {' ': '␣', '\n': '⏎', '\t': '⇥', '\r': '␍', '': '∅'}


def rows(patterns) -> list[tuple[str, np.ndarray]]:
  """List patterns as (label, [h, q, k]), in the natural order of their paths.

  Args:
    patterns: arrays by module path, as returned by `attention.capture`. Each
      index of the leading axes (layers of a stack, batch rows) becomes an item.

  Raises:
    ValueError: If there are no patterns, or one has fewer than three axes.
  """
  if not patterns:
    raise ValueError('patterns: expected at least one, got none')
  found = []
  for path in sorted(patterns, key=_natural_key):
    array = np.asarray(patterns[path], np.float32)
    if array.ndim < 3:
      raise ValueError(
        f'patterns: expected [..., h, q, k] at {path!r}, got {array.shape}'
      )
    leading = array.shape[:-3]
    for index in np.ndindex(leading):
      # Axes of size one need no index in the label.
      numbers = [i for i, n in zip(index, leading, strict=True) if n > 1]
      label = path + ''.join(f'[{i}]' for i in numbers)
      found.append((label, array[index]))
  return found


def pattern_grid(
  patterns, queries=None, keys=None, *, head_numbers=None
) -> Figure:
  """Plot all patterns in a grid with a row per layer and a column per head.

  Args:
    patterns: arrays by module path; see `rows`.
    queries: a label per query, shown up to 16 of them; numbers by default.
    keys: a label per key; by default `queries` for square patterns.
    head_numbers: numbers in the titles of the heads; 0, 1, … by default.

  Raises:
    ValueError: See `rows`; labels that do not match the patterns.
  """
  layers = rows(patterns)
  labels = None
  if queries is not None or keys is not None:
    _, *labels = _check(layers[0][1][0], queries, keys)
  num_heads = max(len(heads) for _, heads in layers)
  shape = (len(layers), num_heads)
  figure = Figure(
    figsize=(1.5 * num_heads + 1.4, 1.5 * len(layers) + 0.8),
    layout='constrained',
  )
  grid = figure.subplots(*shape, squeeze=False)
  largest = max(heads.max() for _, heads in layers)
  for row, ((label, heads), panels) in enumerate(
    zip(layers, grid, strict=True)
  ):
    for number, axes in enumerate(panels):
      if number >= len(heads):
        axes.axis('off')
        continue
      image = axes.imshow(
        heads[number],
        vmin=0,
        vmax=largest,
        cmap=_COLOURS,
        aspect=_aspect(heads[number]),
      )
      is_lowest = all(number >= len(below) for _, below in layers[row + 1 :])
      _label_panel(axes, heads[number], labels, number, is_lowest)
    # The end of the path identifies the layer; the whole path would not fit.
    name = '\n'.join(map(_in_two, label.split('/')[-2:]))
    panels[0].set_ylabel(name, fontsize=7)
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
  """Plot one pattern as a heat map with tokens on both axes.

  Args:
    weights: [q, k].
    queries: a label per query; numbers by default.
    keys: a label per key; by default `queries` for square weights, otherwise
      numbers.
    queries_as: 'rows', or 'columns', in which case each column sums to 1.
    title: the title of the figure, for example the layer and the head.

  Raises:
    ValueError: If the labels do not match the weights, or `queries_as` is
      unknown.
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
  image = axes.imshow(weights, vmin=0, cmap=_COLOURS, aspect=_aspect(weights))
  style = {'fontsize': 8, 'parse_math': False}
  axes.set_xticks(range(len(across)), across, rotation=90, **style)
  axes.set_yticks(range(len(down)), down, **style)
  axes.set(ylabel=names[0], xlabel=names[1])
  figure.colorbar(image, label='weight')
  add_title(figure, title)
  return figure


def flow(weights, queries=None, keys=None, *, title='') -> Figure:
  """Plot queries above keys, joined by lines as wide as the weights.

  Arguments and errors are those of `pattern`. Weights up to 0.02 are not drawn.
  """
  weights, queries, keys = _check(weights, queries, keys)
  longest = max(len(queries), len(keys))
  figure = Figure(
    figsize=(min(24, max(4, 0.3 * longest + 1)), 3.2), layout='constrained'
  )
  axes = figure.subplots()
  # Spread both rows of tokens over the full width.
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
  add_title(figure, title)
  return figure


def _in_two(name):
  """Break a name that is longer than a panel at an underscore."""
  middle = name.find('_', len(name) // 2)
  if len(name) <= _LONGEST_NAME or middle < 0:
    return name
  return f'{name[:middle]}\n{name[middle:]}'


def _aspect(weights):
  """Square cells, unless the pattern would become a thin strip."""
  return 'equal' if max(weights.shape) <= 4 * min(weights.shape) else 'auto'


def _label_panel(axes, weights, labels, column, is_lowest):
  """Label the outer axes of a grid: with tokens if few, else with positions."""
  axes.tick_params(
    labelsize=6, length=2, labelleft=column == 0, labelbottom=is_lowest
  )
  for axis, count, side in (
    (axes.yaxis, weights.shape[0], 0),
    (axes.xaxis, weights.shape[1], 1),
  ):
    names = labels and labels[side]
    if names and len(names) == count <= _MAX_LABELS:
      style = {'rotation': 90} if side else {}
      axis.set_ticks(range(count), names, parse_math=False, **style)
    else:
      axis.set_major_locator(MaxNLocator(4, integer=True))


def add_title(figure, title):
  if title:
    # Wrap, because a path may be wider than a small figure.
    figure.suptitle(title, fontsize=9, wrap=True, parse_math=False)


def _check(weights, queries, keys):
  """Validate the weights and labels; return labels with visible whitespace."""
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
        f'{name}: expected {count} labels for weights of shape '
        f'{weights.shape}, got {len(labels)}'
      )
  return weights, visible(queries), visible(keys)


def visible(tokens) -> list[str]:
  """Convert tokens to labels in which whitespace is visible."""
  return [
    ''.join(_VISIBLE.get(s, s) for s in str(token)) or _VISIBLE['']
    for token in tokens
  ]


def _natural_key(path):
  """A sort key that places block_10 after block_2."""
  return [
    (1, int(part), '') if part.isdigit() else (0, 0, part)
    for part in re.split(r'(\d+)', path)
  ]
