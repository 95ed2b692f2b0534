"""An interactive viewer of patterns: one HTML file that works offline."""

import base64
import importlib.resources
import json

import numpy as np

from attention.plots.patterns import rows


def viewer(
  patterns, queries, keys=None, *, head_numbers=None, title='Attention'
) -> str:
  """Create an HTML page that shows what each token attends to on hover.

  The page has menus for the layer and the head.

  Args:
    patterns: arrays by module path, as returned by `attention.capture`.
    queries: a label per query.
    keys: a label per key; `queries` by default.
    head_numbers: names of the heads; 0, 1, … by default.
    title: the title of the page.

  Returns:
    The HTML text. Weights are stored in steps of 1/65535.

  Raises:
    ValueError: If the shape of a pattern does not match the labels.
  """
  keys = queries if keys is None else keys
  layers = []
  for name, weights in rows(patterns):
    if weights.shape[1:] != (len(queries), len(keys)):
      raise ValueError(
        f'{name}: expected a pattern of {len(queries)} queries and {len(keys)} '
        f'keys to match the labels, got {weights.shape[1:]}'
      )
    quantised = np.rint(np.clip(weights, 0, 1) * 65535).astype('<u2')
    layers.append(
      {
        'name': name,
        'heads': list(head_numbers or range(len(weights))),
        'weights': base64.b64encode(quantised.tobytes()).decode(),
      }
    )
  data = {
    'title': title,
    'queries': list(map(str, queries)),
    'keys': list(map(str, keys)),
    'isSelf': list(queries) == list(keys),
    'layers': layers,
  }
  # Escape '<', so that no token can close the script element.
  text = json.dumps(data).replace('<', '\\u003c')
  page = importlib.resources.files('attention.plots') / 'viewer.html'
  return page.read_text(encoding='utf-8').replace('"DATA"', text, 1)
