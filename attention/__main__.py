"""Use trained models, estimate a config's cost, and check the installation."""

import argparse
import os
import sys

from attention.commands import (
  contacts,
  doctor,
  evaluate,
  export,
  inspect,
  plot,
  sample,
  study,
  translate,
)
from attention.training.main import print_error

_COMMANDS = {
  'sample': sample,
  'translate': translate,
  'evaluate': evaluate,
  'contacts': contacts,
  'plot': plot,
  'study': study,
  'export': export,
  'inspect': inspect,
  'doctor': doctor,
}


def main(argv: list[str] | None = None) -> int:
  """Run a command; returns the exit status, 2 for a usage error."""
  parser = _parser()
  arguments, rest = parser.parse_known_args(argv)
  if rest and arguments.run is not inspect.run:
    parser.error(f'unrecognized arguments: {" ".join(rest)}')
  arguments.rest = rest
  try:
    return arguments.run(arguments)
  except BrokenPipeError:
    # The reader has closed the pipe; suppress errors of the final flush.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (ValueError, OSError, NotImplementedError) as error:
    return print_error(error)


def _parser():
  parser = _Parser(prog='python -m attention', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  for name, command in _COMMANDS.items():
    add = commands.add_parser(name, help=command.__doc__)
    command.add_flags(add)
    add.set_defaults(run=command.run)
  return parser


class _Parser(argparse.ArgumentParser):
  """A parser that reports a usage error in one line."""

  def error(self, message):
    self.exit(2, f'error: {message} (see {self.prog} --help)\n')


if __name__ == '__main__':
  sys.exit(main())
