"""The command line of train.py: --config, --workdir, --config.key=value."""

import difflib
import functools
import importlib.util
import pathlib
import re
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from attention.data.files import read_text
from attention.training.training_config import TrainingConfig

# Flags other than --config: default and help text.
_FLAGS = {
  'workdir': ('', "folder for the run's files, created if missing"),
  'profile': ('', 'START:STOP, the steps to trace'),
  'coordinator': ('', 'HOST:PORT of process 0, for a multi-process run'),
  'num_processes': (0, 'total number of processes'),
  'process_id': (-1, 'index of this process, from 0'),
}
_USAGE = {
  'config': 'FILE or FILE:SIZE, such as configs/gpt_char.py:debug',
  'config.KEY': 'override a key of the config: --config.seed=1',
  **{name: text for name, (_, text) in _FLAGS.items()},
}
# Parser of a flag's text and its description, by the type of the default.
_PARSERS = {
  bool: (flags.BooleanParser(), 'true or false'),
  int: (flags.IntegerParser(), 'an integer'),
  float: (flags.FloatParser(), 'a number'),
}


class Arguments(NamedTuple):
  """Parsed command-line arguments."""

  config: ConfigDict
  workdir: pathlib.Path
  profile: tuple[int, int] | None = None  # completed steps: (start, stop)
  coordinator: str = ''  # see processes.start
  num_processes: int = 0
  process_id: int = -1


def usage() -> str:
  """Return the text of `train.py --help`."""
  rows = (f'  --{f"{name}=…":<20}{text}' for name, text in _USAGE.items())
  return '\n'.join(
    [
      'usage: python train.py --config=FILE --workdir=DIR [--NAME=VALUE …]',
      'To resume a stopped run, run the same command again.',
      '',
      *rows,
    ]
  )


def parse(argv: list[str]) -> Arguments:
  """Parse a command line in the form of `sys.argv`.

  Raises:
    ValueError: invalid arguments; the message is one line, with a hint.
    OSError: the config file cannot be read.
  """
  for word in argv[1:]:
    _check_word(word)
  files = [w for w in argv[1:] if w.startswith('--config=')]
  if len(files) != 1:
    raise ValueError(
      f'--config: expected one config file, got {len(files)}; '
      'for example --config=configs/gpt_char.py'
    )
  config = load_config(files[0].removeprefix('--config='))
  for word in argv[1:]:
    _check_key(word, config)
    _check_type(word, config)

  words = [word for word in argv if word not in files]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=values, sys_argv=words
  )
  for name, (default, text) in _FLAGS.items():
    define = (
      flags.DEFINE_integer if isinstance(default, int) else flags.DEFINE_string
    )
    define(name, default, text, flag_values=values)
  try:
    values(words)
  except flags.Error as error:
    raise ValueError(str(error)) from None
  if not values.workdir:
    raise ValueError(
      '--workdir: expected a folder for the run, got none; '
      'for example --workdir=runs/first'
    )
  return Arguments(
    config,
    pathlib.Path(values.workdir),
    _parse_span(values.profile),
    values.coordinator,
    values.num_processes,
    values.process_id,
  )


def _parse_span(text):
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text)
  if not match or int(match[1]) >= int(match[2]):
    raise ValueError(
      f'--profile: expected START:STOP, such as 10:15 for steps 11 to 15, '
      f'got {text}'
    )
  return int(match[1]), int(match[2])


def load_config(name: str) -> ConfigDict:
  """Load the config named by `FILE` or `FILE:SIZE`.

  Raises:
    ValueError: the file is not a config, or has no such size.
    OSError: the file cannot be read.
  """
  path, *size = name.split(':', 1)
  read_text(path)  # gives clear errors for unreadable files
  spec = importlib.util.spec_from_file_location('config', path)
  if spec is None:
    raise ValueError(f'{path}: expected a Python file, NAME.py')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ValueError(f'{path}: {type(error).__name__}: {error}') from error
  if not hasattr(module, 'get_config'):
    raise ValueError(f'{path}: expected a function get_config, found none')
  try:
    config = module.get_config(*size)
  except Exception as error:
    raise ValueError(f'{path}: {type(error).__name__}: {error}') from error
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f'{path}: expected get_config to return a ConfigDict, got '
      f'{type(config).__name__}'
    )
  if not isinstance(config.get('training'), ConfigDict):
    raise ValueError(f'{path}: expected config.training, found none')
  TrainingConfig.complete(config.training)
  return config


def _check_word(word):
  if not word.startswith('--'):
    hint = (
      f'; did you mean --{word}?'
      if word.startswith('config')
      else '; flags have the form --name=value'
    )
    raise ValueError(f'{word}: unexpected argument{hint}')
  if '=' not in word:
    raise ValueError(f'{word}: expected {word}=VALUE')


def _check_key(word, config):
  key = word.split('=')[0].removeprefix('--config.')
  known = _keys(config)
  if word.startswith('--config.') and key not in known:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    hint = f'; did you mean --config.{near[0]}?' if near else ''
    raise ValueError(f'--config.{key}: no such key{hint}')


def _check_type(word, config):
  name, _, text = word.removeprefix('--').partition('=')
  if name.startswith('config.'):
    path = name.removeprefix('config.').split('.')
    value = functools.reduce(lambda x, key: x[key], path, config)
  else:
    value = _FLAGS.get(name, (None,))[0]
  if isinstance(value, ConfigDict):
    key = next(iter(value), 'KEY')
    raise ValueError(
      f'--{name}: expected individual keys, such as --{name}.{key}=…, got '
      f'{text!r}'
    )
  parser, expected = _PARSERS.get(type(value), (None, ''))
  try:
    if parser:
      parser.parse(text)
  except (ValueError, TypeError):
    raise ValueError(f'--{name}: expected {expected}, got {text!r}') from None


def _keys(config, prefix='') -> set[str]:
  found = set()
  for key, value in config.items():
    found.add(prefix + key)
    if isinstance(value, ConfigDict):
      found |= _keys(value, f'{prefix}{key}.')
  return found
