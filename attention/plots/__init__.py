"""Plots of training runs, attention patterns and scores of heads.

Training imports them when it draws: matplotlib takes half a second to import.
"""

from attention.plots.contacts import contact_map
from attention.plots.patterns import DPI, flow, pattern, pattern_grid, rows
from attention.plots.runs import confusion_matrix, loss_curve
from attention.plots.scores import attribution, head_scores, sweep
from attention.plots.viewer import Text, viewer, viewer_of_texts

__all__ = [
  'DPI',
  'Text',
  'attribution',
  'confusion_matrix',
  'contact_map',
  'flow',
  'head_scores',
  'loss_curve',
  'pattern',
  'pattern_grid',
  'rows',
  'sweep',
  'viewer',
  'viewer_of_texts',
]
