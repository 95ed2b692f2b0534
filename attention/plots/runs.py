"""Plots of training runs."""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attention.plots.patterns import DPI


def loss_curve(
  lines: list[dict], path: pathlib.Path, unit: str = 'nats per token'
) -> None:
  """Plot the training and validation losses of a run by step.

  Args:
    lines: lines of metrics.jsonl, as dicts with 'step' and 'train/loss' or
      'eval/loss'.
    path: the output PNG file.
    unit: the unit of the losses.
  """
  figure = Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.subplots()
  for key, label, style in (
    ('train/loss', 'training, one batch', {'color': '0.7', 'linewidth': 1}),
    ('eval/loss', 'validation', {'color': 'C3', 'marker': 'o'}),
  ):
    points = [(line['step'], line[key]) for line in lines if key in line]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, **style)
      if key == 'eval/loss':
        step, value = points[-1]
        axes.annotate(
          f'{value:.3f}',
          (step, value),
          xytext=(8, 0),
          textcoords='offset points',
          va='center',
        )
  axes.set(xlabel='step', ylabel=unit)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)
  if axes.lines:
    axes.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=DPI)


def confusion_matrix(counts, labels, path: pathlib.Path | None = None):
  """Plot a confusion matrix.

  Args:
    counts: integers [true, predicted].
    labels: a name per class.
    path: the output PNG file, if any.

  Returns:
    The matplotlib `Figure`.

  Raises:
    ValueError: If the labels do not match the counts.
  """
  counts = np.asarray(counts)
  if counts.shape != (len(labels), len(labels)):
    raise ValueError(
      f'counts: expected shape {(len(labels), len(labels))} for '
      f'{len(labels)} labels, got {counts.shape}'
    )
  side = min(14, 2.2 + 0.42 * len(labels))
  figure = Figure(figsize=(side, side), layout='constrained')
  axes = figure.subplots()
  shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
  axes.imshow(shares, vmin=0, vmax=1, cmap='Blues')
  for (true, predicted), count in np.ndenumerate(counts):
    if count:
      axes.text(
        predicted,
        true,
        count,
        ha='center',
        va='center',
        fontsize=8,
        color='white' if shares[true, predicted] > 0.5 else 'black',
      )
  style = {'fontsize': 8, 'parse_math': False}
  axes.set_xticks(range(len(labels)), labels, rotation=90, **style)
  axes.set_yticks(range(len(labels)), labels, **style)
  axes.set(xlabel='predicted', ylabel='true')
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
  return figure
