"""Plots of contact maps."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attention.plots.patterns import DPI

_SEPARATION = 6  # least distance along the sequence of the pairs shown
_RIGHT, _WRONG, _UNKNOWN, _TRUE = '#1f77b4', '#d62728', '0.4', '0.6'


def contact_map(
  scores,
  contacts=None,
  path: pathlib.Path | None = None,
  *,
  title: str = '',
) -> Figure:
  """Plot predicted contacts above the diagonal, and true ones below.

  As many pairs, at separations of 6 or more, are predicted as there are
  positions. A predicted pair is blue
  if it is a contact, red if it is none, and grey if that is not known.

  Args:
    scores: [l, l], higher for likelier contacts.
    contacts: [l, l] 1 for contacts, nan for unknown pairs; None: all unknown.
    path: the output PNG file, if any.
    title: title of the figure.

  Returns:
    The matplotlib `Figure`.

  Raises:
    ValueError: the shapes differ.
  """
  scores = np.asarray(scores)
  length = len(scores)
  if contacts is None:
    contacts = np.full((length, length), np.nan)
  contacts = np.asarray(contacts, np.float64)
  if contacts.shape != scores.shape:
    raise ValueError(
      f'contacts: expected shape {scores.shape} as scores, got {contacts.shape}'
    )
  i, j = np.triu_indices(length, _SEPARATION)
  top = np.argsort(-scores[i, j], kind='stable')[:length]
  i_top, j_top = i[top], j[top]
  truth = contacts[i_top, j_top]

  figure = Figure(figsize=(6, 6.8), layout='constrained')
  axes = figure.subplots()
  size = max(3.5, 300 / length) ** 2  # in points², at least visible
  is_true = contacts[i, j] == 1
  for rows, columns, colour, label in (
    (i_top[truth == 1], j_top[truth == 1], _RIGHT, 'predicted, a contact'),
    (i_top[truth == 0], j_top[truth == 0], _WRONG, 'predicted, no contact'),
    (
      i_top[np.isnan(truth)],
      j_top[np.isnan(truth)],
      _UNKNOWN,
      'predicted, unknown',
    ),
    (j[is_true], i[is_true], _TRUE, 'true contacts'),
  ):
    if len(rows):
      axes.scatter(
        columns + 1,
        rows + 1,
        s=size,
        marker='s',
        color=colour,
        linewidths=0,
        label=f'{label}: {len(rows)}',
      )
  axes.plot([1, length], [1, length], color='0.8', linewidth=0.8, zorder=0)
  axes.set(
    xlim=(0.5, length + 0.5),
    ylim=(length + 0.5, 0.5),
    xlabel='position',
    ylabel='position',
    title=title,
  )
  axes.set_box_aspect(1)
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_locator(MaxNLocator(8, integer=True))
  figure.legend(loc='outside lower center', ncols=2, frameon=False, fontsize=8)
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
  return figure
