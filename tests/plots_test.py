"""Tests of the plots, and of the viewer in a browser."""

import html
import re
import shutil
import subprocess

import numpy as np
import pytest

from attention import plots

TOKENS = ['a', ' ', '</script>', '$x$', '\n']
RNG = np.random.default_rng(0)


def _patterns(*shape):
  x = RNG.random(shape)
  return x / x.sum(-1, keepdims=True)


def _images(figure):
  return [axes.images[0] for axes in figure.axes if axes.images]


def test_grid_has_a_row_per_layer_and_a_column_per_head():
  patterns = {
    'gpt/block_10/attention': _patterns(1, 2, 5, 5),
    'gpt/block_9/attention': _patterns(1, 3, 5, 5),
    'stack': _patterns(2, 1, 3, 5, 5),
  }
  figure = plots.pattern_grid(patterns, head_numbers=[4, 5, 7])
  shown = [np.asarray(i.get_array()) for i in _images(figure)]
  expected = [
    *patterns['gpt/block_9/attention'][0],
    *patterns['gpt/block_10/attention'][0],
    *patterns['stack'][0, 0],
    *patterns['stack'][1, 0],
  ]
  np.testing.assert_allclose(shown[: len(expected)], expected, rtol=1e-6)
  labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
  assert labels[:2] == ['block_9\nattention', 'block_10\nattention']
  assert labels[2:4] == ['stack[0]', 'stack[1]']
  assert figure.axes[2].get_title() == 'head 7'


def test_grid_labels_its_outer_axes_with_few_tokens():
  figure = plots.pattern_grid({'a': _patterns(2, 5, 5)}, 'abcde')
  first, second = figure.axes[:2]
  assert [t.get_text() for t in first.get_yticklabels()] == list('abcde')
  assert first.get_aspect() == 1
  assert not any(t.get_visible() for t in second.get_yticklabels())
  shorter = {'a': _patterns(2, 5, 5), 'b': _patterns(1, 5, 5)}
  shorter = plots.pattern_grid(shorter, 'abcde')
  # The second column ends in the first row.
  below = [a.xaxis.get_tick_params()['labelbottom'] for a in shorter.axes[:3]]
  assert below == [False, True, True]
  many = plots.pattern_grid({'a': _patterns(1, 40, 40)}, 'x' * 40)
  assert len(many.axes[0].get_xticks()) < 10


@pytest.mark.parametrize('queries_as', ['rows', 'columns'])
def test_pattern_draws_queries_as_rows_or_columns(tmp_path, queries_as):
  weights = _patterns(3, 5)
  figure = plots.pattern(
    weights, 'xyz', TOKENS, queries_as=queries_as, title='layer $, head 1'
  )
  figure.savefig(tmp_path / 'pattern.png')
  assert figure.get_suptitle() == 'layer $, head 1'
  axes = figure.axes[0]
  down = [t.get_text() for t in axes.get_yticklabels()]
  across = [t.get_text() for t in axes.get_xticklabels()]
  shown = np.asarray(axes.images[0].get_array())
  if queries_as == 'columns':
    down, across, shown = across, down, shown.T
  assert down == ['x', 'y', 'z']
  assert across == ['a', '␣', '</script>', '$x$', '⏎']
  np.testing.assert_allclose(shown, weights, rtol=1e-6)


def test_flow_line_widths_are_proportional_to_weights(tmp_path):
  weights = [[0.75, 0.25, 0], [0, 0.01, 0.99]]
  figure = plots.flow(weights, 'pq', 'xyz', title='layer, head 1')
  figure.savefig(tmp_path / 'flow.png')
  assert figure.get_suptitle() == 'layer, head 1'
  widths = [line.get_linewidth() for line in figure.axes[0].lines]
  np.testing.assert_allclose(widths, [3.75, 1.25, 4.95])


def test_confusion_matrix_shows_counts(tmp_path):
  counts = np.array([[5, 1], [0, 7]])
  path = tmp_path / 'plots' / 'confusion.png'
  figure = plots.confusion_matrix(counts, ['cat', 'dog'], path)
  assert [t.get_text() for t in figure.axes[0].texts] == ['5', '1', '7']
  assert path.stat().st_size > 1000


def test_mismatched_shapes_and_labels_raise():
  pattern = _patterns(3, 5)
  for call, message in (
    (lambda: plots.pattern(pattern[0]), r'expected \[q, k\], got shape \(5,\)'),
    (lambda: plots.pattern(pattern, 'ab'), 'queries: expected 3 labels'),
    (lambda: plots.flow(pattern, 'abc', 'ab'), 'keys: expected 5 labels'),
    (lambda: plots.pattern(pattern, queries_as='x'), "'rows' or 'columns'"),
    (lambda: plots.pattern_grid({}), 'expected at least one, got none'),
    (lambda: plots.pattern_grid({'a': pattern}), r"\[..., h, q, k\] at 'a'"),
    (lambda: plots.viewer({'a': pattern[None]}, 'ab'), 'a: expected a pattern'),
    (lambda: plots.confusion_matrix([[1]], 'ab'), r'expected shape \(2, 2\)'),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _browse(page, script, tmp_path):
  """The document of a page after a script has run."""
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if browser is None:
    pytest.skip('no chromium on this machine')
  path = tmp_path / 'page.html'
  path.write_text(page.replace('</html>', f'<script>{script}</script></html>'))
  done = subprocess.run(
    [
      browser,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      f'--user-data-dir={tmp_path / "profile"}',
      '--dump-dom',
      path.as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  return done.stdout


_HOVER = r"""
at('layer').value = 1; chooseLayer();
at('head').value = 1; chooseHead();
at('queries').children[2].dispatchEvent(new MouseEvent('mouseenter'));
const found = [...at('SIDE').children].map(b => +b.title);
const shades = [...at('SIDE').children].map(
  b => +b.style.background.match(/([\d.e-]+)\)$/)[1]);
const before = at('status').textContent;
at('layer').value = 0; chooseLayer();
document.body.append(before + ' then ' + at('status').textContent +
  ' shades ' + JSON.stringify(shades) + ' found ' + JSON.stringify(found) +
  ' ' + at('map').width + 'x' + at('map').height);
"""


@pytest.mark.parametrize('side, keys', [('queries', None), ('keys', 'xyz')])
def test_hovering_in_a_browser_shows_the_weights(tmp_path, side, keys):
  num_keys = len(keys or TOKENS)
  patterns = {
    'first': _patterns(2, 5, num_keys),
    'second': _patterns(2, 5, num_keys),
  }
  page = plots.viewer(patterns, TOKENS, keys, title='<b>&')
  assert not re.search(r'(src|href)=|https?://', page), 'needs a network'
  shown = _browse(page, _HOVER.replace('SIDE', side), tmp_path)
  shown = html.unescape(shown)
  weights = re.search(r'found \[([^]]*)\] (\d+x\d+)\s', shown)
  assert weights, shown[-2000:]
  np.testing.assert_allclose(
    [float(w) for w in weights[1].split(',')],
    patterns['second'][1, 2],
    atol=6e-4,
  )
  shades = re.search(r'shades \[([^]]*)\]', shown)
  np.testing.assert_allclose(
    [float(w) for w in shades[1].split(',')],
    patterns['second'][1, 2] / patterns['second'][1].max(),
    atol=1e-3,
  )
  assert weights[2] == f'{num_keys}x5'
  assert '</script> (2) attends to' in shown
  assert re.search(r'\d then Hover over a token', shown), 'stale status'


def test_a_contact_map_counts_right_wrong_and_unknown_pairs(tmp_path):
  length = 30
  scores, contacts = np.zeros((2, length, length))
  for rank, (i, j, truth) in enumerate(
    [(0, 9, 1), (1, 20, 1), (2, 9, 0), (3, 29, np.nan), (4, 9, 1)]
  ):
    scores[i, j] = scores[j, i] = 9 - rank
    contacts[i, j] = contacts[j, i] = truth
  contacts[5, 28] = contacts[28, 5] = 1  # true, not among the top 30
  path = tmp_path / 'new' / 'map.png'
  figure = plots.contact_map(scores, contacts, path)
  labels = [t.get_text() for t in figure.legends[0].get_texts()]
  assert [label for label in labels if 'no contact' not in label] == [
    'predicted, a contact: 2',
    'predicted, unknown: 1',
    'true contacts: 3',
  ]
  assert 'predicted, no contact: 27' in labels
  assert path.stat().st_size > 5_000
  with pytest.raises(ValueError, match='contacts: expected shape'):
    plots.contact_map(scores, contacts[1:])
