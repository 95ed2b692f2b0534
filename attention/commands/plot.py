"""Draw a model's attention patterns in a text, as images and a web page."""

import pathlib

from attention import plots
from attention.commands import trained_models


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  trained_models.add_flags(parser)
  parser.add_argument(
    '--text',
    required=True,
    help="input text; for a run of task 'msa', an alignment file",
  )
  parser.add_argument(
    '--layers', help='numbers or paths, such as 0,2 (default: all)'
  )
  parser.add_argument('--heads', help='numbers, such as 0,3 (default: all)')
  parser.add_argument(
    '--queries_as',
    default='rows',
    help='rows or columns, in the image of a single pattern, which shows the '
    'first selected head of the lowest selected layer (default: rows)',
  )
  trained_models.add_out(parser)


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  folder = pathlib.Path(arguments.workdir or arguments.model)
  task, params = trained_models.open_task(arguments)
  if not hasattr(task, 'patterns'):
    raise ValueError(f'{folder}: its task does not read text')
  found = task.patterns(
    params,
    arguments.text,
    layers=_numbers_or_names(arguments.layers),
    heads=_numbers(arguments.heads),
  )
  out = trained_models.plots_folder(arguments)
  numbers = _numbers(arguments.heads)
  for name, (queries, keys, patterns) in found.items():
    layer, heads = plots.rows(patterns)[0]
    shown = f'{layer}, head {numbers[0] if numbers else 0}'
    for kind, figure in (
      (
        'grid',
        plots.pattern_grid(patterns, queries, keys, head_numbers=numbers),
      ),
      (
        'pattern',
        plots.pattern(
          heads[0],
          queries,
          keys,
          queries_as=arguments.queries_as,
          title=shown,
        ),
      ),
      ('flow', plots.flow(heads[0], queries, keys, title=shown)),
    ):
      path = out / f'{name}_{kind}.png'
      figure.savefig(path, dpi=plots.DPI)
      print(path)
    path = out / f'{name}.html'
    title = f'{name} of {folder.name}'
    page = plots.viewer(
      patterns, queries, keys, head_numbers=numbers, title=title
    )
    path.write_text(page, encoding='utf-8')
    print(path)
  return 0


def _numbers_or_names(words: str | None):
  if words is None:
    return None
  return [int(w) if w.isdigit() else w for w in words.split(',')]


def _numbers(words: str | None):
  try:
    return None if words is None else [int(w) for w in words.split(',')]
  except ValueError:
    raise ValueError(
      f'heads: expected comma-separated numbers, got {words!r}'
    ) from None
