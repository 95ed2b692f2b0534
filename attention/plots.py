"""Pictures: of how a run went."""

import pathlib

from matplotlib.figure import Figure


def loss_curve(lines: list[dict], path: pathlib.Path) -> None:
  """Draws the losses of a run against its steps.

  Args:
    lines: of metrics.jsonl: dicts with 'step' and 'train/loss', 'eval/loss'.
    path: of the PNG to write.
  """
  figure = Figure(figsize=(7, 4.2), layout='constrained')
  axes = figure.subplots()
  for key, label, style in (
    ('train/loss', 'training', {'color': '0.7', 'linewidth': 1}),
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
          xytext=(0, 8),
          textcoords='offset points',
          ha='right',
        )
  axes.set(xlabel='step', ylabel='nats per token')
  axes.spines[['top', 'right']].set_visible(False)
  axes.grid(axis='y', alpha=0.3)
  if axes.lines:
    axes.legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
