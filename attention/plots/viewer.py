"""A page to explore patterns with: one HTML file that needs no network."""

import base64
import importlib.resources
import json

import numpy as np

from attention.plots.patterns import rows


def viewer(
  patterns, queries, keys=None, *, head_numbers=None, title='Attention'
) -> str:
  """A page: hover over a token, see what it attends to; choose layer and head.

  Args:
    patterns: by module path, as `attention.capture` returns them.
    queries: a label a query.
    keys: a label a key; `queries` by default.
    head_numbers: what to call the heads; 0, 1, … by default.
    title: of the page.

  Returns:
    The HTML. Weights in it are exact to 1/65535.

  Raises:
    ValueError: patterns whose shape doesn't fit the labels.
  """
  keys = queries if keys is None else keys
  layers = []
  for name, weights in rows(patterns):
    if weights.shape[1:] != (len(queries), len(keys)):
      raise ValueError(
        f'{name}: expected a pattern of {len(queries)} queries and {len(keys)} '
        f'keys, as there are labels, got {weights.shape[1:]}'
      )
    whole = np.rint(np.clip(weights, 0, 1) * 65535).astype('<u2')
    layers.append(
      {
        'name': name,
        'heads': list(head_numbers or range(len(weights))),
        'weights': base64.b64encode(whole.tobytes()).decode(),
      }
    )
  data = {
    'title': title,
    'queries': list(map(str, queries)),
    'keys': list(map(str, keys)),
    'isSelf': list(queries) == list(keys),
    'layers': layers,
  }
  # No text can end the script that it stands in.
  text = json.dumps(data).replace('<', '\\u003c')
  page = importlib.resources.files('attention.plots') / 'viewer.html'
  return page.read_text(encoding='utf-8').replace('"DATA"', text, 1)
