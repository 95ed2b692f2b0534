"""Plots of a number per layer and head, or per other part of a model."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attention.plots.patterns import add_title, visible

_MAX_NAMED = 64  # rows or columns that are named; some are numbered above
_MAX_COUNTED = 16  # rows or columns without names that are all numbered
_MAX_NUMBERED = 12  # rows and columns of panels with numbers in their cells
_LONGEST_NUMBER = 6  # characters that fit into a cell
_LONGEST_NAME = 40  # characters of a row, a column or a part
_POSITIVE, _NEGATIVE, _OTHER = '#2f79b5', '#c43c3c', '0.6'
_MISSING = '0.85'


def sweep(
  values,
  rows=None,
  columns=None,
  *,
  row_name='layer',
  column_name='head',
  title='',
  unit='',
) -> Figure:
  """Plot the effects of a sweep, such as of patching or ablating each head.

  Blue is positive, red negative and white 0; nan is grey. Without negative
  values, all of the colour scale is blue. Up to 12 x 12 cells
  contain their numbers. Row 0 is at the top.

  Args:
    values: [rows, columns].
    rows: a label per row, shown up to 64 of them; numbers by default.
    columns: a label per column, like `rows`.
    row_name: what a row is.
    column_name: what a column is.
    title: the title of the figure.
    unit: the unit of the values, beside the colour bar.

  Raises:
    ValueError: If `values` is no matrix or the labels do not match it.
  """
  values = _matrix(values, 'values: expected [rows, columns]')
  rows = _labels('rows', rows, values.shape[0], values.shape)
  columns = _labels('columns', columns, values.shape[1], values.shape)
  figure, (axes,) = _panels(1, values.shape, rows, columns)
  _heat_map(axes, values, unit, is_signed=(values < 0).any())
  _label(axes, rows, columns)
  axes.set(xlabel=column_name, ylabel=row_name)
  add_title(figure, title)
  return figure


def head_scores(scores, layers=None, heads=None, *, title='') -> Figure:
  """Plot scores of all heads side by side, a panel and a colour scale each.

  Colours, missing scores and numbers are those of `sweep`.

  Args:
    scores: [layers, heads] by name, such as 'induction' or 'entropy'.
    layers: a label per layer, shown up to 64 of them; numbers by default.
    heads: a label per head, like `layers`.
    title: the title of the figure.

  Raises:
    ValueError: If there are no scores, or shapes or labels do not match.
  """
  if not scores:
    raise ValueError('scores: expected at least one, got none')
  scores = {
    name: _matrix(values, f'scores: expected [layers, heads] at {name!r}')
    for name, values in scores.items()
  }
  first, *_ = scores.values()
  for name, values in scores.items():
    if values.shape != first.shape:
      raise ValueError(
        f'scores: expected shape {first.shape} at {name!r}, as the first, '
        f'got {values.shape}'
      )
  layers = _labels('layers', layers, first.shape[0], first.shape)
  heads = _labels('heads', heads, first.shape[1], first.shape)
  figure, panels = _panels(len(scores), first.shape, layers, heads)
  for axes, (name, values) in zip(panels, scores.items(), strict=True):
    _heat_map(axes, values, is_signed=(values < 0).any())
    _label(axes, layers, heads)
    axes.set_title(name, fontsize=9, parse_math=False)
    axes.set_xlabel('head')
    axes.tick_params(labelleft=axes is panels[0])
  panels[0].set_ylabel('layer')
  add_title(figure, title)
  return figure


def attribution(parts, *, top=None, title='', unit='logit') -> Figure:
  """Plot the contributions of the parts of a sum as bars, the largest on top.

  The title gives the total.

  Args:
    parts: contributions by name, such as of heads and MLPs to a logit.
    top: how many to show, the largest by absolute value; the others are added
      up in one bar at the bottom. None: all.
    title: the title of the figure.
    unit: the unit of the contributions.

  Raises:
    ValueError: If there are no parts, one is not finite, or `top` is less
      than 1.
  """
  if not parts:
    raise ValueError('parts: expected at least one, got none')
  if top is not None and top < 1:
    raise ValueError(f'top: expected at least 1, got {top}')
  parts = {name: float(value) for name, value in parts.items()}
  for name, value in parts.items():
    if not np.isfinite(value):
      raise ValueError(
        f'parts: expected finite values, got {value} at {name!r}'
      )
  by_size = sorted(parts, key=lambda name: -abs(parts[name]))
  count = len(parts) if top is None else top
  shown, others = by_size[:count], by_size[count:]
  shown.sort(key=lambda name: -parts[name])
  names = _shorten(shown)
  values = [parts[name] for name in shown]
  colours = [_POSITIVE if value > 0 else _NEGATIVE for value in values]
  if others:
    names.append(f'other ({len(others)})')
    values.append(sum(parts[name] for name in others))
    colours.append(_OTHER)

  figure = Figure(
    figsize=(4.5 + _width(names), 0.24 * len(names) + 1.2), layout='constrained'
  )
  axes = figure.subplots()
  bars = axes.barh(range(len(names)), values, color=colours)
  axes.bar_label(bars, _format(np.array(values)), padding=3, fontsize=8)
  axes.axvline(0, color='0.3', linewidth=0.8)
  axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.margins(x=0.18)  # for the numbers beside the bars
  axes.tick_params(axis='y', length=0)
  axes.tick_params(axis='x', labelsize=8)
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.set_xlabel(unit)
  (total,) = _format(np.array([sum(parts.values())]))
  add_title(figure, f'{title}\ntotal {total} {unit}'.strip())
  return figure


def _matrix(values, expected):
  values = np.asarray(values, np.float32)
  if values.ndim != 2 or not values.size:
    raise ValueError(f'{expected}, got shape {values.shape}')
  return values


def _labels(name, labels, count, shape):
  """Validate labels; None if there are too many to show."""
  if labels is None:
    return list(map(str, range(count))) if count <= _MAX_COUNTED else None
  if len(labels) != count:
    raise ValueError(
      f'{name}: expected {count} labels for values of shape {shape}, '
      f'got {len(labels)}'
    )
  return _shorten(labels) if count <= _MAX_NAMED else None


def _shorten(names):
  """Cut the middle of long names; their ends tell module paths apart."""
  half = _LONGEST_NAME // 2
  names = [
    # Show spaces at the ends, as of tokens, but not those inside a phrase.
    name if name.strip() == name != '' and name.isprintable() else shown
    for name, shown in zip(map(str, names), visible(names), strict=True)
  ]
  return [
    name if len(name) <= _LONGEST_NAME else f'{name[:half]}…{name[-half:]}'
    for name in names
  ]


def _width(names):
  """The width of the longest name in inches, about."""
  return 0.075 * max(map(len, names or ['']))


def _is_numbered(shape):
  return max(shape) <= _MAX_NUMBERED


def _panels(count, shape, rows, columns):
  """A figure of panels side by side that has room for their labels."""
  cell = 0.38 if _is_numbered(shape) else 0.2
  height, width = (min(14, max(1.6, cell * n)) for n in shape)
  figure = Figure(
    figsize=(
      (width + 1.1) * count + _width(rows) + 0.5,
      height + _width(columns) + 1.2,
    ),
    layout='constrained',
  )
  return figure, figure.subplots(1, count, squeeze=False)[0]


def _largest(values):
  """The largest finite absolute value, or 1 if all are 0."""
  return np.abs(values).max(where=np.isfinite(values), initial=0) or 1.0


def _heat_map(axes, values, unit='', *, is_signed=True):
  largest = _largest(values)
  image = axes.imshow(
    values,
    vmin=-largest if is_signed else 0,
    vmax=largest,
    cmap='RdBu' if is_signed else 'Blues',
    aspect='auto',
  )
  axes.set_facecolor(_MISSING)
  bar = axes.figure.colorbar(image, ax=axes, label=unit)
  bar.ax.tick_params(labelsize=7)
  bar.locator = MaxNLocator(5)
  numbers = _format(values.ravel())
  if _is_numbered(values.shape) and max(map(len, numbers)) <= _LONGEST_NUMBER:
    for (row, column), number in zip(
      np.ndindex(values.shape), numbers, strict=True
    ):
      is_dark = abs(values[row, column]) > 0.65 * largest
      axes.text(
        column,
        row,
        number,
        ha='center',
        va='center',
        fontsize=7,
        color='white' if is_dark else 'black',
      )


def _format(values):
  """Format numbers with as many decimals as the largest of them needs."""
  magnitude = int(np.log10(_largest(values)))
  if not -3 < magnitude < 6:
    return [f'{x:.1e}' for x in values]
  decimals = max(0, 2 - magnitude)
  # Adding 0 turns -0 into 0.
  return [f'{x + 0.0:.{decimals}f}' for x in np.round(values, decimals)]


def _label(axes, rows, columns):
  """Name the ticks, or number some of them."""
  axes.tick_params(labelsize=7, length=2)
  is_long = columns is not None and max(map(len, columns)) > 2
  for axis, names, style in (
    (axes.yaxis, rows, {}),
    (axes.xaxis, columns, {'rotation': 90 if is_long else 0}),
  ):
    if names:
      axis.set_ticks(range(len(names)), names, parse_math=False, **style)
    else:
      axis.set_major_locator(MaxNLocator(8, integer=True))
