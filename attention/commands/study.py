"""Report what each head of a language model does, as a table and figures."""

import pathlib

import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attention import plots
from attention.commands import trained_models
from attention.training.tasks.study import (
  SCORES,
  repeated_tokens,
  why_no_sum,
)

_LONGEST_LABEL = 40  # characters of a text
_TOP = 20  # parts of a logit that are drawn


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  trained_models.add_flags(parser)
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    '--text',
    action='append',
    help='input text; may be given several times, and scores are then means '
    'over the texts',
  )
  what.add_argument(
    '--random_tokens',
    type=int,
    metavar='N',
    help='in place of a text, N random tokens, repeated once, a probe of '
    'induction; 2 N tokens must fit into the context',
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='of the random tokens (default: 0)'
  )
  trained_models.add_out(parser)


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  task, params = trained_models.open_task(arguments, 'language')
  if arguments.text:
    labels = list(map(_shorten, arguments.text))
    rows = [task.encode('text', text) for text in arguments.text]
  else:
    count = arguments.random_tokens
    labels = [f'{count} random tokens, twice']
    rows = [repeated_tokens(task, count, arguments.seed)]
  studies = [task.study(params, tokens) for tokens in rows]
  # Texts without repeated tokens have no scores of induction.
  scores = np.asarray(jnp.nanmean(jnp.stack([s.scores for s in studies]), 0))
  Console(highlight=False).print(_table(scores))
  if np.isnan(scores).any():
    print('–: no token occurs twice, or there is one token only')
  if reason := why_no_sum(task.model_fields):
    print(f'no attribution.png: {reason}')

  name = pathlib.Path(arguments.workdir or arguments.model).name
  subject = labels[0] if len(labels) == 1 else f'means over {len(labels)} texts'
  out = trained_models.plots_folder(arguments)
  for file, figure in _figures(studies, labels, scores, f'{name}: {subject}'):
    figure.savefig(out / file, dpi=plots.DPI)
    print(out / file)
  texts = [_text(*pair) for pair in zip(studies, labels, strict=True)]
  path = out / 'study.html'
  page = plots.viewer_of_texts(texts, title=f'Study of {name}')
  path.write_text(page, encoding='utf-8')
  print(path)
  return 0


def _shorten(text):
  """Name a text in one line, by its start and its end."""
  text, half = text.replace('\n', '⏎'), _LONGEST_LABEL // 2
  if len(text) <= _LONGEST_LABEL:
    return text
  return f'{text[:half]}…{text[-half:]}'


def _table(scores):
  """A table of scores [scores, layers, heads] with a row per head."""
  table = Table(
    'layer',
    'head',
    *(name.replace(' ', '\n') for name in SCORES),
    box=box.SIMPLE_HEAD,
    pad_edge=False,
    caption='*: highest of its column, lowest of entropy',
    caption_justify='left',
  )
  for column in table.columns:
    column.justify = 'right'
  best = [
    (np.fmin if name == 'entropy (nats)' else np.fmax).reduce(x, axis=None)
    for name, x in zip(SCORES, scores, strict=True)
  ]
  for layer, head in np.ndindex(scores.shape[1:]):
    cells = map(_cell, scores[:, layer, head], best)
    table.add_row(str(layer), str(head), *cells)
  return table


def _cell(score, best):
  if np.isnan(score):
    return '– '
  return f'[bold]{score:.3f}*[/]' if score == best else f'{score:.3f} '


def _figures(studies, labels, scores, title):
  """Yield (file name, figure)."""
  named = dict(zip(SCORES, scores, strict=True))
  yield 'scores.png', plots.head_scores(named, title=title)
  for number, (study, label) in enumerate(zip(studies, labels, strict=True)):
    if study.parts:
      (token, _), *_ = study.guesses[-1][-1]
      title = f'{label}: next token {token!r}'
      figure = plots.attribution(study.parts, top=_TOP, title=title)
      yield f'attribution{f"_{number + 1}" if number else ""}.png', figure


def _text(study, label):
  """A text of the page."""
  names = [f'layer {layer}' for layer in range(len(study.patterns))]
  return plots.Text(
    label=label,
    queries=study.tokens,
    patterns=dict(zip(names, study.patterns, strict=True)),
    head_norms=dict(zip(names, study.norms, strict=True)),
    lens=list(zip(names, study.guesses, strict=True)),
  )
