"""Draws the pictures of docs/algorithms.

  python docs/figures.py

writes docs/images/*.png. Where tiles are masked is computed by the package, not
drawn by hand.
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle

from attention import Mask
from attention.ops.implementations.chunked.tiles import Tiles, find_spans

_IMAGES = pathlib.Path(__file__).parent / 'images'
_SKIPPED, _PARTIAL, _WHOLE = '#f1f1ee', '#e8a33d', '#3b6ea8'
_INK, _PALE, _ACCENT = '#2b2b2b', '#c9d8ea', '#b3402a'
_STYLE = {
  'font.family': 'DejaVu Sans',
  'font.size': 9,
  'text.color': _INK,
  'axes.edgecolor': _INK,
  'axes.labelcolor': _INK,
  'axes.titlesize': 9.5,
}


def main():
  _IMAGES.mkdir(exist_ok=True)
  with plt.rc_context(_STYLE):
    for draw in (
      masked_tiles,
      running_softmax,
      batch_loop,
      array_bias_gradient,
      distance_bias_gradient,
      kernels,
    ):
      figure = draw()
      path = _IMAGES / f'{draw.__name__}.png'
      figure.savefig(path, dpi=150, bbox_inches='tight', pad_inches=0.08)
      plt.close(figure)
      print(path)


def masked_tiles():
  """Which tiles of the logits are computed, by mask."""
  length, tiles = 96, Tiles(rows=1, queries=16, keys=8)
  masks = (
    ('no mask', None),
    ('Mask.causal()', Mask.causal()),
    ('Mask.window(20, 0)', Mask.window(20, 0)),
    (
      'Mask.causal()\n& Mask.lengths(…)',
      Mask.causal() & Mask.lengths(key_lengths=np.array([70])),
    ),
  )
  figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.9))
  for axis, (title, mask) in zip(axes, masks, strict=True):
    grid = np.zeros((length // tiles.queries, length // tiles.keys))
    spans = find_spans(mask, length, length, tiles)
    for row, (first, whole, rest, last) in enumerate(spans):
      grid[row, first:last] = 1
      grid[row, whole:rest] = 2
    axis.pcolormesh(
      grid,
      cmap=ListedColormap([_SKIPPED, _PARTIAL, _WHOLE]),
      vmin=0,
      vmax=2,
      edgecolors='white',
      linewidth=1.2,
    )
    axis.set(title=title, xlabel='keys', xticks=[], yticks=[])
    axis.invert_yaxis()
    axis.set_box_aspect(1)
    _without_frame(axis)
  axes[0].set_ylabel('queries')
  handles = [
    Patch(color=_WHOLE, label='computed; the mask is not evaluated'),
    Patch(color=_PARTIAL, label='computed with the mask'),
    Patch(facecolor=_SKIPPED, edgecolor='#bbbbbb', label='skipped'),
  ]
  figure.legend(handles=handles, loc='lower center', ncol=3, frameon=False)
  figure.subplots_adjust(wspace=0.12, bottom=0.16)
  return figure


def running_softmax():
  """One block of queries absorbs tiles of keys one after another."""
  figure, axis = _canvas(9, 2.75)
  for i in range(3):
    x = 0.3 + 3.1 * i
    _box(axis, x, 1.65, 1.5, 0.8, f'logits\nof tile {i + 1}', _PALE)
    _box(axis, x, 0.1, 1.5, 0.8, 'top, total,\nvalues', '#f6e3c3')
    _arrow(axis, (x + 0.75, 1.6), (x + 0.75, 0.95))
    axis.text(x + 0.87, 1.27, 'absorb', va='center', fontsize=8, color=_ACCENT)
    if i < 2:
      _arrow(axis, (x + 1.55, 0.5), (x + 3.05, 0.5))
      axis.text(
        x + 2.3,
        0.56,
        'rescaled by\nexp(top − new top)',
        ha='center',
        va='bottom',
        fontsize=7.2,
      )
  _arrow(axis, (8.05, 0.5), (8.75, 0.5))
  _box(axis, 8.8, 0.1, 1.9, 0.8, 'output =\nvalues / total', 'white')
  axis.set(xlim=(0.2, 10.8), ylim=(0, 2.55))
  return figure


def batch_loop():
  """Many short sequences: some rows of the batch at a time."""
  figure, axis = _canvas(8.4, 2.6)
  for i in range(12):
    group = i // 3
    color = _WHOLE if group == 1 else _PALE
    x = 0.6 * i + 0.18 * group
    for j in range(3):
      _rectangle(axis, x + 0.06 * j, 1.3 + 0.06 * j, 0.46, 0.7, color)
    axis.text(x + 0.3, 1.1, f'{i}', ha='center', fontsize=8)
  _bracket(
    axis, 1.98, 3.7, 2.28, 'logits of these rows and all heads exist now'
  )
  _box(axis, 2.26, 0.0, 1.15, 0.5, 'bias [h, q, k]', '#f6e3c3')
  _arrow(axis, (2.84, 0.55), (2.84, 1.0))
  axis.text(
    3.6,
    0.25,
    'forward: added to every group;  backward: its gradient is\n'
    'accumulated over the groups, at its own size',
    va='center',
    fontsize=8,
  )
  axis.text(-0.15, 1.65, 'batch\nrows', ha='right', va='center')
  axis.set(xlim=(-0.75, 7.9), ylim=(-0.05, 2.75))
  return figure


def array_bias_gradient():
  """Each tile of an array bias's gradient, over the rows that share it."""
  figure, axis = _canvas(8.2, 2.7)
  for i in range(4):
    x, y = 0.5 * i, 0.24 * i
    _grid(axis, x, y, 4, 0.42, highlight=(1, 2), zorder=10 - i)
  axis.text(0.84, -0.12, 'gradients of the logits,', ha='center', va='top')
  axis.text(
    0.84,
    -0.38,
    'one batch row after another; never stored',
    ha='center',
    va='top',
    fontsize=8,
  )
  _arrow(axis, (3.55, 1.0), (4.75, 1.0))
  axis.text(4.15, 1.08, 'one program\nper tile', ha='center', va='bottom')
  _grid(axis, 5.0, 0.12, 4, 0.42, highlight=(1, 2), only=True)
  axis.text(
    5.84,
    -0.12,
    'gradient of the bias [h, q, k],',
    ha='center',
    va='top',
  )
  axis.text(
    5.84,
    -0.38,
    'float32; each tile is stored once',
    ha='center',
    va='top',
    fontsize=8,
  )
  axis.set(xlim=(-0.55, 7.3), ylim=(-0.6, 2.55))
  return figure


def distance_bias_gradient():
  """A diagonal of tiles is owned by one program."""
  figure, axis = _canvas(8.2, 2.6)
  size, side = 6, 0.34
  for row in range(size):
    for column in range(size):
      is_own = column - row == -1
      _rectangle(
        axis,
        column * side,
        (size - 1 - row) * side,
        side * 0.94,
        side * 0.94,
        _ACCENT if is_own else (_PALE if column <= row else _SKIPPED),
      )
  axis.text(1.02, -0.12, 'tiles of the logits', ha='center', va='top')
  axis.text(
    1.02, -0.38, '(causal mask; all rows)', ha='center', va='top', fontsize=8
  )
  _arrow(axis, (2.2, 1.0), (3.15, 1.0))
  axis.text(2.67, 1.08, 'sum along\na diagonal', ha='center', va='bottom')
  _rectangle(axis, 3.35, 0.68, 0.68, 0.68, _ACCENT)
  axis.text(3.69, 0.56, 'one tile', ha='center', va='top')
  _arrow(axis, (4.2, 1.0), (5.15, 1.0))
  axis.text(4.67, 1.08, 'skew,\nsum', ha='center', va='bottom')
  for i in range(11):
    color = _ACCENT if 3 <= i <= 5 else (_PALE if i < 6 else _SKIPPED)
    _rectangle(axis, 5.35 + 0.19 * i, 0.9, 0.17, 0.24, color)
  axis.text(
    6.4,
    0.56,
    'gradient by distance key − query\n[h, q + k − 1], then of the parameters',
    ha='center',
    va='top',
    fontsize=8,
  )
  axis.set(xlim=(-0.1, 7.8), ylim=(-0.6, 2.15))
  return figure


def kernels():
  """What a program of each kernel owns, and what it loops over."""
  titles = (
    ('forward', 'output, top, log total', 'row'),
    ('gradient of query', 'd query', 'row'),
    ('gradients of key, value', 'd key, d value', 'column'),
    ('gradient of bias', 'd bias', 'tile'),
  )
  figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.75))
  for axis, (title, result, kind) in zip(axes, titles, strict=True):
    for row in range(5):
      for column in range(5):
        is_own = {'row': row == 3, 'column': column == 1}.get(
          kind, (row, column) == (3, 1)
        )
        color = _SKIPPED if column > row else (_WHOLE if is_own else _PALE)
        _rectangle(axis, column, 4 - row, 0.94, 0.94, color)
    white = {'color': 'white', 'mutation_scale': 11, 'linewidth': 1.6}
    if kind == 'row':
      _arrow(axis, (0.25, 1.47), (3.75, 1.47), **white)
    elif kind == 'column':
      _arrow(axis, (1.47, 3.75), (1.47, 0.2), **white)
    else:
      axis.text(
        1.47,
        1.44,
        'all\nrows',
        ha='center',
        va='center',
        color='white',
        fontsize=7.5,
      )
    axis.set(xlim=(-0.1, 5.05), ylim=(-0.1, 5.05), title=title, xlabel=result)
    axis.set(xticks=[], yticks=[], aspect='equal')
    _without_frame(axis)
  axes[0].set_ylabel('queries')
  figure.subplots_adjust(wspace=0.12)
  return figure


def _canvas(width, height):
  figure, axis = plt.subplots(figsize=(width, height))
  axis.set_axis_off()
  return figure, axis


def _without_frame(axis):
  for spine in axis.spines.values():
    spine.set_visible(False)


def _rectangle(axis, x, y, width, height, color, zorder=2):
  axis.add_patch(
    Rectangle(
      (x, y),
      width,
      height,
      facecolor=color,
      edgecolor='white',
      linewidth=0.8,
      zorder=zorder,
    )
  )


def _box(axis, x, y, width, height, text, color):
  axis.add_patch(
    Rectangle(
      (x, y), width, height, facecolor=color, edgecolor=_INK, linewidth=0.8
    )
  )
  axis.text(
    x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=8.5
  )


def _arrow(axis, start, end, color=_INK, mutation_scale=10, linewidth=1.1):
  axis.add_patch(
    FancyArrowPatch(
      start,
      end,
      arrowstyle='-|>',
      mutation_scale=mutation_scale,
      color=color,
      linewidth=linewidth,
      shrinkA=0,
      shrinkB=0,
      zorder=20,
    )
  )


def _bracket(axis, left, right, y, text):
  axis.plot(
    [left, left, right, right],
    [y - 0.08, y, y, y - 0.08],
    color=_INK,
    linewidth=0.9,
  )
  axis.text(
    (left + right) / 2, y + 0.08, text, ha='center', va='bottom', fontsize=8.5
  )


def _grid(axis, x, y, count, side, highlight, only=False, zorder=2):
  """A square of tiles, one of them in the accent's colour."""
  axis.add_patch(
    Rectangle(
      (x - 0.03, y - 0.03),
      count * side + 0.06,
      count * side + 0.06,
      facecolor='white',
      edgecolor='#999999',
      linewidth=0.6,
      zorder=zorder,
    )
  )
  for row in range(count):
    for column in range(count):
      is_own = (row, column) == highlight
      color = _ACCENT if is_own else (_SKIPPED if only else _PALE)
      _rectangle(
        axis,
        x + column * side,
        y + (count - 1 - row) * side,
        side,
        side,
        color,
        zorder=zorder,
      )


if __name__ == '__main__':
  main()
