"""python -m attention COMMAND: use a run, count, check.

Commands: sample, translate, evaluate, plot, inspect, doctor.
"""

import argparse
import os
import pathlib
import sys

import jax
import jax.numpy as jnp

import attention
from attention import plots
from attention.data import translation
from attention.ops.platforms import PLATFORMS
from attention.training import command_line, tasks, trained, translate_lines
from attention.training.devices import catalogue, report
from attention.training.main import complain, set_up_jax
from attention.training.reporting import model_summary
from attention.training.workdir import run_files

_STRATEGIES = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status: 2 for a mistake of the user's."""
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  if rest and arguments.run is not inspect:
    parser.error(f'unrecognized arguments: {" ".join(rest)}')
  arguments.rest = rest
  try:
    return arguments.run(arguments)
  except BrokenPipeError:
    # Whoever read has enough; there is nobody to tell.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError, NotImplementedError) as error:
    return complain(error)


def sample(arguments) -> int:
  """Prints the prompt and what a run's model writes after it, as it comes."""
  task, params = _open(arguments, 'language')
  for text in task.stream(
    params,
    arguments.prompt,
    arguments.num_tokens,
    seed=arguments.seed,
    **{name: getattr(arguments, name) for name in _STRATEGIES},
  ):
    print(text, end='', flush=True)
  print()
  return 0


def translate(arguments) -> int:
  """Reads lines, and prints the answers of a run's model, one a line."""
  task, params = _open(arguments, 'translation')
  num_refused = translate_lines.answer_lines(
    task,
    params,
    sys.stdin.buffer,
    sys.stdout,
    sys.stderr,
    beam_size=arguments.beam_size,
  )
  return 1 if num_refused else 0


def evaluate(arguments) -> int:
  """Measures a run's model on what its config holds out, or on given files."""
  files = arguments.source, arguments.target
  if files == (None, None):
    set_up_jax()
    workdir = pathlib.Path(arguments.workdir)
    config = run_files.load_config(workdir)
    task = tasks.create(config, run_files.load_data(workdir))
    params = trained.params(arguments.workdir, task)
    if config.task != 'translation':
      for name, value in task.evaluate(params, jax.device_put).items():
        print(f'{name} {value:.4f}')
      return 0
    parts = {k: v for k, v in task.data.pairs.items() if k != 'train'}
  else:
    if None in files:
      raise ValueError('--source and --target: expected both, or neither')
    parts = {arguments.source: translation.read_pairs(*files)}
    task, params = _open(arguments, 'translation')
  for name, (sources, targets) in parts.items():
    for number, reason in task.refusals(sources).items():
      print(f'{name}: line {number + 1}: {reason}', file=sys.stderr)
    print(f'{name}: {len(sources):,} pairs')
    for line in task.report(params, sources, targets, arguments.beam_size):
      print(f'  {line}', flush=True)
  return 0


def plot(arguments) -> int:
  """Draws what a run's model attends to in a text, as pictures and a page."""
  workdir = pathlib.Path(arguments.workdir)
  task, params = _open(arguments)
  if not hasattr(task, 'patterns'):
    raise ValueError(f'{workdir}: its task reads no text')
  found = task.patterns(
    params,
    arguments.text,
    layers=_numbers_or_names(arguments.layers),
    heads=_numbers(arguments.heads),
  )
  out = pathlib.Path(arguments.out or workdir / 'plots')
  out.mkdir(parents=True, exist_ok=True)
  numbers = _numbers(arguments.heads)
  for name, (queries, keys, patterns) in found.items():
    layer, heads = plots.rows(patterns)[0]
    shown = f'{layer}, head {numbers[0] if numbers else 0}'
    for kind, figure in (
      ('grid', plots.pattern_grid(patterns, head_numbers=numbers)),
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
      figure.savefig(path, dpi=120)
      print(path)
    path = out / f'{name}.html'
    title = f'{name} of {workdir.name}'
    page = plots.viewer(
      patterns, queries, keys, head_numbers=numbers, title=title
    )
    path.write_text(page, encoding='utf-8')
    print(path)
  return 0


def inspect(arguments) -> int:
  """Counts a config's parameters, FLOPs and memory; --config.key=value too."""
  words = [f'--config={arguments.config}', *arguments.rest, '--workdir=unused']
  config = command_line.parse(['inspect', *words]).config
  if arguments.device is None:
    if arguments.decode:
      raise ValueError('--decode: expected --device=… too')
    print(model_summary.inspect(config, tasks.create(config)))
    return 0
  target = catalogue.find(arguments.device)
  task = tasks.create(config)
  lines = (
    report.of_decoding(task, target)
    if arguments.decode
    else report.of_training(config, task, target, arguments.seconds)
  )
  for line in lines:
    print(line, flush=True)
  return 0


def doctor(_) -> int:
  """Prints versions, devices, and what attention dispatches to."""
  for name, version in run_files.versions().items():
    print(f'{name:<18}{version}')
  print(f'{"backend":<18}{jax.default_backend()}')
  for device in jax.devices():
    print(f'{"device":<18}{device.id}: {device.device_kind}')
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((8, 1024, 8, 64), dtype)
    told = attention.explain(x, x, x, is_causal=True)
    print(f'\nattention of {jnp.dtype(dtype).name} [8, 1024, 8, 64], causal:')
    for implementation, reason in told:
      print(f'  {implementation:<16}{reason}')
  print('\nthe same in bfloat16, by platform:')
  for platform in PLATFORMS:
    told = attention.explain(x, x, x, is_causal=True, platform=platform)
    chosen = [name for name, reason in told if reason == 'chosen']
    print(f'  {platform:<16}{chosen[0]}')
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
      f'heads: expected numbers with commas between, got {words!r}'
    ) from None


def _open(arguments, kind=None):
  """A run's task without data, and its parameters."""
  set_up_jax()
  return trained.load(arguments.workdir, kind)


def _parser():
  parser = _Parser(prog='python -m attention', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)

  add = commands.add_parser('sample', help=sample.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument('--prompt', default='\n', help='text to begin with')
  add.add_argument('--num_tokens', type=int, default=400)
  add.add_argument(
    '--temperature', type=float, default=0.8, help='0: the likeliest token'
  )
  add.add_argument('--top_k', type=int, help='draw among the k likeliest')
  add.add_argument(
    '--top_p', type=float, help='draw among the fewest that reach p together'
  )
  add.add_argument(
    '--min_p', type=float, help="draw among those with p × the likeliest's"
  )
  add.add_argument(
    '--repetition_penalty', type=float, help='above 1: fewer repetitions'
  )
  add.add_argument('--seed', type=int, default=0)
  add.set_defaults(run=sample)

  add = commands.add_parser('translate', help=translate.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument('--beam_size', type=int, default=5, help='1: greedily')
  add.set_defaults(run=translate)

  add = commands.add_parser('evaluate', help=evaluate.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument('--source', help='a file of lines, plain or gzip')
  add.add_argument('--target', help='their translations, line by line')
  add.add_argument('--beam_size', type=int, default=5, help='1: greedily')
  add.set_defaults(run=evaluate)

  add = commands.add_parser('plot', help=plot.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument('--text', required=True, help='what the model reads')
  add.add_argument('--layers', help='numbers or paths, as 0,2; all by default')
  add.add_argument('--heads', help='numbers, as 0,3; all by default')
  add.add_argument(
    '--queries_as',
    default='rows',
    help='rows or columns, in the picture of a single pattern: the first head '
    'asked for, of the lowest layer asked for',
  )
  add.add_argument('--out', help="folder for the files; the run's plots/")
  add.set_defaults(run=plot)

  add = commands.add_parser('inspect', help=inspect.__doc__)
  add.add_argument('--config', required=True, help='file of the config')
  add.add_argument(
    '--device',
    help='compiles the training step for h100, a100:8, v5e:4x4, …, none of '
    'which has to be attached, and tells what it takes of a device',
  )
  add.add_argument(
    '--decode', action='store_true', help='writing instead of training'
  )
  add.add_argument(
    '--seconds',
    type=float,
    default=50,
    help='within which other batches are compiled, to find the largest',
  )
  add.set_defaults(run=inspect)

  add = commands.add_parser('doctor', help=doctor.__doc__)
  add.set_defaults(run=doctor)
  return parser


class _Parser(argparse.ArgumentParser):
  """Answers a mistake in one line."""

  def error(self, message):
    self.exit(2, f'error: {message} (see {self.prog} --help)\n')


if __name__ == '__main__':
  sys.exit(main())
