"""Report the parameters, FLOPs and memory of a model."""

from attention.training import command_line, tasks, transformers_folder
from attention.training.devices import catalogue, report
from attention.training.reporting import model_summary
from attention.training.tasks.language import Language


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument(
    '--config', help='config file; --config.KEY=VALUE overrides its keys'
  )
  what.add_argument(
    '--model', metavar='FOLDER', help='folder of a model of transformers'
  )
  parser.add_argument(
    '--device',
    help='compile the training step for h100, a100:8, v5e:4x4, …, which need '
    'not be attached, and report its memory and operations per device',
  )
  parser.add_argument(
    '--decode',
    action='store_true',
    help='compile decoding instead of training',
  )
  parser.add_argument(
    '--seconds',
    type=float,
    default=50,
    help='time budget for finding the largest batch that fits (default: 50)',
  )


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  if arguments.model:
    if arguments.rest or arguments.device or arguments.decode:
      raise ValueError('--model: expected no other flags')
    fields = transformers_folder.load_fields(arguments.model)
    print(model_summary.inspect(Language(None, fields, None)))
    return 0
  words = [f'--config={arguments.config}', *arguments.rest, '--workdir=unused']
  config = command_line.parse(['inspect', *words]).config
  if arguments.device is None:
    if arguments.decode:
      raise ValueError('--decode: requires --device=…')
    print(model_summary.inspect(tasks.create(config)))
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
