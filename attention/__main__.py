"""python -m attention sample|plot|inspect|doctor: use a run, count, check."""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

import attention
from attention import plots
from attention.training import flags, inspection, records, tasks
from attention.training.checkpoints import Checkpoints, abstract
from attention.training.main import complain, set_up_jax


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status: 2 for a mistake of the user's."""
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  if rest and arguments.run is not inspect:
    parser.error(f'unrecognized arguments: {" ".join(rest)}')
  arguments.rest = rest
  try:
    return arguments.run(arguments)
  except (ValueError, OSError) as error:
    return complain(error)


def sample(arguments) -> int:
  """Prints the prompt and what a run's model writes after it."""
  workdir = pathlib.Path(arguments.workdir)
  config = records.load_config(workdir)
  set_up_jax()
  task = tasks.load(config, workdir)
  params = _restore_params(workdir, task)
  print(
    task.sample(
      params,
      arguments.prompt,
      arguments.num_tokens,
      seed=arguments.seed,
      temperature=arguments.temperature,
      top_k=arguments.top_k,
    )
  )
  return 0


def plot(arguments) -> int:
  """Draws what a run's model attends to in a text, as pictures and a page."""
  workdir = pathlib.Path(arguments.workdir)
  config = records.load_config(workdir)
  set_up_jax()
  task = tasks.load(config, workdir)
  if not hasattr(task, 'patterns'):
    raise ValueError(f'{workdir}: a run of {config.task!r} reads no text')
  found = task.patterns(
    _restore_params(workdir, task),
    arguments.text,
    layers=_numbers_or_names(arguments.layers),
    heads=_numbers(arguments.heads),
  )
  out = pathlib.Path(arguments.out or workdir / 'plots')
  out.mkdir(parents=True, exist_ok=True)
  numbers = _numbers(arguments.heads)
  for name, (queries, keys, patterns) in found.items():
    first = plots.rows(patterns)[0][1][0]  # the first layer's first head
    for kind, figure in (
      ('grid', plots.pattern_grid(patterns, head_numbers=numbers)),
      (
        'pattern',
        plots.pattern(first, queries, keys, queries_as=arguments.queries_as),
      ),
      ('flow', plots.flow(first, queries, keys)),
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
  config, _ = flags.parse(['inspect', *words])
  print(inspection.inspect(config, tasks.create(config)))
  return 0


def doctor(_) -> int:
  """Prints versions, devices, and what would serve a call of attention."""
  for name, version in records.versions().items():
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


def _restore_params(workdir, task):
  directory = workdir / 'checkpoints'
  if not directory.is_dir():
    raise ValueError(f'{workdir}: no checkpoint yet; train it further first')
  checkpoints = Checkpoints(directory)
  step = checkpoints.latest_step()
  if step is None:
    raise ValueError(f'{workdir}: no checkpoint yet; train it further first')
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = checkpoints.restore(step, {'params': abstract(shapes, device)})
  return params['params']


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
  add.add_argument('--seed', type=int, default=0)
  add.set_defaults(run=sample)

  add = commands.add_parser('plot', help=plot.__doc__)
  add.add_argument('--workdir', required=True, help='folder of the run')
  add.add_argument('--text', required=True, help='what the model reads')
  add.add_argument('--layers', help='numbers or paths, as 0,2; all by default')
  add.add_argument('--heads', help='numbers, as 0,3; all by default')
  add.add_argument(
    '--queries_as', default='rows', help='of the single pattern: rows, columns'
  )
  add.add_argument('--out', help="folder for the files; the run's plots/")
  add.set_defaults(run=plot)

  add = commands.add_parser('inspect', help=inspect.__doc__)
  add.add_argument('--config', required=True, help='file of the config')
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
