"""Plots of training runs and of attention patterns."""

from attention.plots.contacts import contact_map
from attention.plots.patterns import DPI, flow, pattern, pattern_grid, rows
from attention.plots.runs import confusion_matrix, loss_curve
from attention.plots.viewer import viewer

__all__ = [
  'DPI',
  'confusion_matrix',
  'contact_map',
  'flow',
  'loss_curve',
  'pattern',
  'pattern_grid',
  'rows',
  'viewer',
]
