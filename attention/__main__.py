"""python -m attention sample|doctor: use a trained model, look at a machine."""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

import attention
from attention.training import records, tasks
from attention.training.checkpoints import Checkpoints, abstract
from attention.training.main import complain, set_up_jax


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status: 2 for a mistake of the user's."""
  arguments = _parser().parse_args(argv)
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

  add = commands.add_parser('doctor', help=doctor.__doc__)
  add.set_defaults(run=doctor)
  return parser


class _Parser(argparse.ArgumentParser):
  """Answers a mistake in one line."""

  def error(self, message):
    self.exit(2, f'error: {message} (see {self.prog} --help)\n')


if __name__ == '__main__':
  sys.exit(main())
