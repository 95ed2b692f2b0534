"""Tests of the plots, and of the viewer in a browser."""

import html
import json
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


def _tick_labels(axis):
  return [t.get_text() for t in axis.get_ticklabels()]


def test_a_sweep_is_centred_at_zero_and_numbered(tmp_path):
  values = np.array([[0.5, -2.0, np.nan], [0.0, -0.001, 1.0]])
  figure = plots.sweep(
    values, ['block 0', ' b'], TOKENS[2:], title='$', unit='logit'
  )
  figure.savefig(tmp_path / 'sweep.png')
  axes, bar = figure.axes
  image = axes.images[0]
  np.testing.assert_allclose(image.get_array().filled(np.nan), values)
  assert (image.norm.vmin, image.norm.vmax) == (-2, 2)
  assert axes.get_ylim() == (1.5, -0.5), 'row 0 is not at the top'
  assert _tick_labels(axes.yaxis) == ['block 0', '␣b']
  assert _tick_labels(axes.xaxis) == ['</script>', '$x$', '⏎']
  numbers = [t.get_text() for t in axes.texts]
  assert numbers == ['0.50', '-2.00', 'nan', '0.00', '0.00', '1.00']
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('head', 'layer')
  assert bar.get_ylabel() == 'logit'
  zeros = plots.sweep(np.zeros((2, 2)), row_name='x').axes[0]
  assert zeros.images[0].norm.vmax == 1
  assert zeros.get_ylabel() == 'x'


def test_a_large_sweep_has_some_numbers_on_its_axes():
  figure = plots.sweep(RNG.normal(size=(24, 16)))
  axes = figure.axes[0]
  figure.draw_without_rendering()
  assert not axes.texts
  assert 4 < len(axes.get_yticks()) < 12
  assert _tick_labels(axes.xaxis) == list(map(str, range(16)))
  named = plots.sweep(np.zeros((100, 2)), list(map(str, range(100)))).axes[0]
  assert len(named.get_yticks()) < 12
  long = plots.sweep(np.zeros((1, 1)), ['transformer/' + 'x' * 50 + '/mlp'])
  (name,) = _tick_labels(long.axes[0].yaxis)
  assert len(name) == 41
  assert name.startswith('transformer/xx') and name.endswith('xx/mlp')


def test_numbers_that_do_not_fit_are_left_out():
  assert not plots.sweep([[-1e-4, 1e-3]]).axes[0].texts
  assert not plots.sweep([[-123456, 1]]).axes[0].texts
  assert plots.sweep([[-0.01, 0.02]]).axes[0].texts


def test_head_scores_have_a_panel_and_a_scale_each(tmp_path):
  scores = {
    'induction': RNG.random((3, 2)),
    '$entropy': 5 * RNG.random((3, 2)),
    'copying': np.array([[-0.5, 0.2], [0.1, np.nan], [0.3, 0.0]]),
  }
  figure = plots.head_scores(scores, layers='abc', title='heads')
  figure.savefig(tmp_path / 'scores.png')
  panels = [axes for axes in figure.axes if axes.images]
  assert [axes.get_title() for axes in panels] == list(scores)
  for axes, values in zip(panels, scores.values(), strict=True):
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, values, rtol=1e-6)
    largest = np.nanmax(np.abs(values))
    limits = axes.images[0].norm.vmin, axes.images[0].norm.vmax
    least = -largest if np.nanmin(values) < 0 else 0
    np.testing.assert_allclose(limits, (least, largest), rtol=1e-6)
    assert len(axes.texts) == 6
  assert _tick_labels(panels[0].yaxis) == ['a', 'b', 'c']
  shown = [axes.yaxis.get_tick_params()['labelleft'] for axes in panels]
  assert shown == [True, False, False]
  assert not plots.head_scores({'a': np.ones((24, 16))}).axes[0].texts


def test_attribution_sorts_parts_and_adds_up_the_others(tmp_path):
  parts = {'mlp': 2.0, 'a' * 60: -3.0, '$b$': 0.25, 'c': -0.5, 'd': 1.0}
  figure = plots.attribution(parts, title='logit of $x$')
  figure.savefig(tmp_path / 'parts.png')
  axes = figure.axes[0]
  names = ['mlp', 'd', '$b$', 'c', 'a' * 20 + '…' + 'a' * 20]
  assert _tick_labels(axes.yaxis) == names
  widths = [bar.get_width() for bar in axes.patches]
  np.testing.assert_allclose(widths, [2, 1, 0.25, -0.5, -3])
  assert axes.get_ylim()[0] > axes.get_ylim()[1], 'the largest is not on top'
  assert figure.get_suptitle() == 'logit of $x$\ntotal -0.25 logit'
  assert axes.get_xlabel() == 'logit'

  figure = plots.attribution(parts, top=2, unit='nats')
  axes = figure.axes[0]
  assert _tick_labels(axes.yaxis) == ['mlp', names[-1], 'other (3)']
  widths = [bar.get_width() for bar in axes.patches]
  np.testing.assert_allclose(widths, [2, -3, 0.75])
  assert figure.get_suptitle() == 'total -0.25 nats'
  assert len(plots.attribution(parts, top=5).axes[0].patches) == 5


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
    (
      lambda: plots.sweep([1, 2]),
      r'expected \[rows, columns\], got shape \(2,',
    ),
    (lambda: plots.sweep(pattern, 'ab'), 'rows: expected 3 labels'),
    (lambda: plots.sweep(pattern, None, 'ab'), 'columns: expected 5 labels'),
    (lambda: plots.head_scores({}), 'scores: expected at least one, got none'),
    (lambda: plots.head_scores({'a': [1]}), r"\[layers, heads\] at 'a', got"),
    (
      lambda: plots.head_scores({'a': pattern, 'b': pattern.T}),
      r"expected shape \(3, 5\) at 'b', as the first, got \(5, 3\)",
    ),
    (lambda: plots.head_scores({'a': pattern}, 'ab'), 'layers: expected 3'),
    (lambda: plots.head_scores({'a': pattern}, None, 'ab'), 'heads: expected'),
    (lambda: plots.attribution({}), 'parts: expected at least one, got none'),
    (lambda: plots.attribution({'a': 1}, top=0), 'top: expected at least 1'),
    (lambda: plots.attribution({'a': np.inf}), "finite values, got inf at 'a'"),
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
    'first': _patterns(3, 5, num_keys),
    'second': _patterns(3, 5, num_keys),
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


def _text(**changes):
  fields = {
    'label': 'plain',
    'queries': TOKENS,
    'patterns': {'a': _patterns(1, 3, 5, 5)},
  }
  return plots.Text(**fields | changes)


_TEXTS = r"""
const before = at('queries').innerHTML + at('lens').hidden + at('keys').hidden;
at('text').value = 1; at('text').onchange();
const mean = [...at('queries').querySelectorAll('i')].map(bar => bar.title);
at('layer').value = 1; chooseLayer();
at('head').value = 1; chooseHead();
at('queries').children[2].dispatchEvent(new MouseEvent('mouseenter'));
const bars = [...at('queries').querySelectorAll('i')];
const cells = [...at('table').rows].map(row =>
  [...row.cells].map(cell => cell.textContent));
const cell = at('table').rows[1].cells[1], stop = cell.tabIndex;
cell.focus();
for (const key of ['ArrowRight', 'ArrowDown', 'ArrowDown', 'ArrowUp'])
  document.activeElement.dispatchEvent(
    new KeyboardEvent('keydown', {key, bubbles: true}));
const result = {
  mean, stop, cells,
  hidden: [at('text').parentElement.hidden, at('lens').hidden,
    at('keys').hidden, at('direction').parentElement.hidden],
  status: at('status').textContent,
  norms: bars.map(bar => bar.title),
  heights: bars.map(bar => +bar.style.getPropertyValue('--norm')),
  shown: bars.map(bar => getComputedStyle(bar).display),
  guesses: at('guesses').textContent,
  title: document.activeElement.title,
  shade: document.activeElement.style.background,
  stops: [...at('table').querySelectorAll('[tabindex="0"]')].map(
    cell => cell.textContent),
};
at('text').value = 0; at('text').onchange();
result.again = before ===
  at('queries').innerHTML + at('lens').hidden + at('keys').hidden;
result.bars = getComputedStyle(at('queries').querySelector('i')).display;
document.body.append('result ' + JSON.stringify(result) + ' end');
"""


def test_a_page_of_texts_has_norms_and_a_logit_lens(tmp_path):
  norms = 7 * RNG.random((2, 1, 3, 5))
  guesses = [[(token, 0.75), ('</b>', 0.125)] for token in reversed(TOKENS)]
  other = _text(
    label='</script>',
    keys='xyz',
    patterns={'stack': _patterns(2, 1, 3, 5, 3)},
    head_norms={'stack': norms},
    lens=[('first', guesses), ('</script>', guesses[::-1])],
  )
  page = plots.viewer_of_texts([_text(), other], title='<b>&')
  assert not re.search(r'(src|href)=|https?://', page), 'needs a network'
  shown = html.unescape(_browse(page, _TEXTS, tmp_path))
  result = re.search(r'result ({.*}) end', shown, re.DOTALL)
  assert result, shown[-2000:]
  result = json.loads(result[1])
  assert result['hidden'] == [False, False, False, True]
  for name, expected in (
    ('mean', norms[0, 0].mean(0)),
    ('norms', norms[1, 0, 1]),
  ):
    found = [float(title.split(': ')[1]) for title in result[name]]
    np.testing.assert_allclose(found, expected, rtol=6e-3)
  np.testing.assert_allclose(
    result['heights'], norms[1, 0, 1] / norms[1, 0, 1].max(), atol=1e-3
  )
  assert result['shown'] == ['block'] * 5
  assert '</script> (2) attends to' in result['status']
  assert result['status'].endswith('the output ' + result['norms'][2][20:])
  labels = ['a', '␣', '</script>', '$x$', '⏎']
  assert result['cells'] == [
    ['', *labels],
    ['first', *reversed(labels)],
    ['</script>', *labels],
  ]
  # Right, down, not farther down, and up.
  assert result['guesses'] == 'first, ␣ (1): $x$ 0.750, </b> 0.125'
  assert result['title'] == '$x$ 0.750\n</b> 0.125'
  shade = float(result['shade'].split('/ ')[1].rstrip(')'))
  np.testing.assert_allclose(shade, 0.7 * 0.75)
  assert (result['stop'], result['stops']) == (0, ['$x$'])
  assert result['again'] and result['bars'] == 'none'


def test_texts_that_do_not_match_raise():
  guesses = [[('a', 0.5)]] * 5
  for changes, message in (
    ({'queries': 'ab'}, 'a: expected a pattern of 2 queries'),
    ({'head_norms': {'b': np.ones((1, 3, 5))}}, "paths of patterns, got 'b'"),
    (
      {'head_norms': {'a': np.ones((3, 5))}},
      r"= \(1, 3, 5\) at 'a' in 'plain', got \(3, 5\)",
    ),
    ({'head_norms': {'a': np.full((1, 3, 5), np.nan)}}, 'finite numbers from'),
    ({'lens': [('x', guesses[1:])]}, "5 positions at 'x' in 'plain', got 4"),
    ({'lens': [('x', [*guesses[1:], []])]}, r"at 'x' in 'plain', got \[\]"),
    ({'lens': [('x', [[('a', 7)]] * 5)]}, r"got \[\('a', 7\)\]"),
  ):
    with pytest.raises(ValueError, match=message):
      plots.viewer_of_texts([_text(**changes)])
  with pytest.raises(ValueError, match='texts: expected at least one, got'):
    plots.viewer_of_texts([])


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
