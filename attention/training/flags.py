"""The command line of train.py: --config, --workdir, --config.key=value."""

import difflib
import pathlib

from absl import flags
from ml_collections import config_flags

from attention.data.language import read_text


def parse(argv: list[str]):
  """A config and a workdir from a command line.

  Args:
    argv: as in `sys.argv`.

  Returns:
    (config, workdir).

  Raises:
    ValueError: in one line, what is wrong and what to do.
    OSError: a config file that can't be read.
  """
  _check_words(argv)
  # First alone, so that keys can be checked against what the file has.
  alone = [argv[0], *(a for a in argv if a.startswith('--config='))]
  _check_file(alone)
  try:
    known = _keys(_define(alone).config)
    for word in argv[1:]:
      key = word.split('=')[0].removeprefix('--config.')
      if word.startswith('--config.') and key not in known:
        raise ValueError(f'--config.{key}: no such key{_nearest(key, known)}')
    values = _define(argv)
  except flags.Error as error:
    raise ValueError(str(error)) from None
  if not values.workdir:
    raise ValueError(
      '--workdir: expected a folder for the run, got none; '
      'for example --workdir=runs/first'
    )
  return values.config, pathlib.Path(values.workdir)


def _define(argv) -> flags.FlagValues:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    'config',
    None,
    'Config file, FILE or FILE:SIZE; --config.KEY=VALUE changes one key.',
    flag_values=values,
  )
  flags.DEFINE_string(
    'workdir', None, "Folder for the run's files.", flag_values=values
  )
  values(argv)
  return values


def _check_words(argv):
  for word in argv[1:]:
    if not word.startswith('--'):
      hint = (
        f'; did you mean --{word}?'
        if word.startswith('config')
        else '; flags have the form --name=value'
      )
      raise ValueError(f'{word}: a leftover word{hint}')
    if '=' not in word and word not in ('--help', '--helpfull'):
      raise ValueError(f'{word}: expected {word}=VALUE')


def _check_file(argv):
  if len(argv) != 2:
    raise ValueError(
      f'--config: expected one config file, got {len(argv) - 1}; '
      'for example --config=configs/gpt_char.py'
    )
  path = argv[1].removeprefix('--config=').split(':')[0]
  text = read_text(path)
  if 'def get_config' not in text:
    raise ValueError(f'{path}: expected a function get_config, found none')


def _keys(config, prefix='') -> set[str]:
  found = set()
  for key, value in config.items():
    found.add(prefix + key)
    if hasattr(value, 'items'):
      found |= _keys(value, f'{prefix}{key}.')
  return found


def _nearest(key, known):
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  return f'; did you mean --config.{near[0]}?' if near else ''
