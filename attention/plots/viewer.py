"""An interactive viewer of patterns: one HTML file that works offline."""

import base64
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attention.plots.patterns import rows


@dataclass(frozen=True, kw_only=True)
class Text:
  """A text in `viewer_of_texts`."""

  # The name in the menu of texts.
  label: str
  # A label per query.
  queries: Sequence
  # A label per key; None: `queries`.
  keys: Sequence | None = None
  # [..., h, q, k] by module path, as returned by `attention.capture`.
  patterns: Mapping
  # Names of the heads; None: 0, 1, …
  head_numbers: Sequence | None = None
  # Norms of the heads' outputs, [..., h, q] by paths that are in `patterns`.
  head_norms: Mapping | None = None
  # What a logit lens reads: (layer, guesses) pairs from the first layer to the
  # last, with guesses[q] a list of (token, probability), the likeliest first.
  lens: Sequence | None = None


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
  text = Text(
    label=title,
    queries=queries,
    keys=keys,
    patterns=patterns,
    head_numbers=head_numbers,
  )
  return viewer_of_texts([text], title=title)


def viewer_of_texts(texts, *, title='Attention') -> str:
  """Create a page like that of `viewer` with a menu of several texts.

  A text with `head_norms` has bars under its queries, as high as the norm of
  the chosen head's output at each, or the mean of all heads' norms. A text with
  `lens` has a table of the likeliest token by layer and position.

  Args:
    texts: a list of `Text`.
    title: the title of the page.

  Returns:
    The HTML text. Weights are stored in steps of 1/65535, norms in steps of
    1/65535 of the largest in their layer.

  Raises:
    ValueError: If there are no texts, or the parts of one do not match.
  """
  if not texts:
    raise ValueError('texts: expected at least one, got none')
  data = {'title': title, 'texts': list(map(_describe, texts))}
  # Escape '<', so that no token can close the script element.
  text = json.dumps(data).replace('<', '\\u003c')
  page = importlib.resources.files('attention.plots') / 'viewer.html'
  return page.read_text(encoding='utf-8').replace('"DATA"', text, 1)


def _describe(text):
  """What the page needs to know of a text, as JSON values."""
  queries = list(map(str, text.queries))
  keys = queries if text.keys is None else list(map(str, text.keys))
  norms = _norms(text)
  layers = []
  for name, weights in rows(text.patterns):
    if weights.shape[1:] != (len(queries), len(keys)):
      raise ValueError(
        f'{name}: expected a pattern of {len(queries)} queries and {len(keys)} '
        f'keys to match the labels, got {weights.shape[1:]}'
      )
    layer = {
      'name': name,
      'heads': list(text.head_numbers or range(len(weights))),
      'weights': _encode(weights),
    }
    if name in norms:
      largest = float(norms[name].max()) or 1.0
      layer |= {'norms': _encode(norms[name] / largest), 'largestNorm': largest}
    layers.append(layer)
  return {
    'label': text.label,
    'queries': queries,
    'keys': keys,
    'isSelf': queries == keys,
    'layers': layers,
    'lens': _lens(text),
  }


def _encode(shares):
  """Store numbers between 0 and 1 as base64 text."""
  quantised = np.rint(np.clip(shares, 0, 1) * 65535).astype('<u2')
  return base64.b64encode(quantised.tobytes()).decode()


def _norms(text):
  """Checked norms [h, q] by the label of their layer."""
  norms = {k: np.asarray(v) for k, v in (text.head_norms or {}).items()}
  for path, array in norms.items():
    if path not in text.patterns:
      raise ValueError(
        f'head_norms: expected paths of patterns, got {path!r} in '
        f'{text.label!r}'
      )
    shape = np.shape(text.patterns[path])[:-1]
    if array.shape != shape:
      raise ValueError(
        f'head_norms: expected [..., h, q] = {shape} at {path!r} in '
        f'{text.label!r}, got {array.shape}'
      )
    if not (np.isfinite(array) & (array >= 0)).all():
      raise ValueError(
        f'head_norms: expected finite numbers from 0 at {path!r} in '
        f'{text.label!r}, got others'
      )
  # `rows` numbers the layers of a stack.
  columns = {path: array[..., None] for path, array in norms.items()}
  return {name: x[..., 0] for name, x in rows(columns)} if norms else {}


def _lens(text):
  """Checked (layer, guesses) pairs."""
  table = []
  for layer, positions in text.lens or []:
    if len(positions) != len(text.queries):
      raise ValueError(
        f'lens: expected {len(text.queries)} positions at {layer!r} in '
        f'{text.label!r}, got {len(positions)}'
      )
    for guesses in positions:
      if not guesses or not all(0 <= p < 1.001 for _, p in guesses):
        raise ValueError(
          f'lens: expected pairs of token and probability at {layer!r} in '
          f'{text.label!r}, got {guesses!r}'
        )
    table.append(
      {
        'layer': str(layer),
        'positions': [
          [(str(token), round(float(p), 4)) for token, p in guesses]
          for guesses in positions
        ],
      }
    )
  return table
