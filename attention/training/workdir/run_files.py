"""The records of a run in its workdir: config.json, data.json, env.json."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import jax
import ml_collections

from attention.training.training_config import TrainingConfig
from attention.training.workdir import Unusable, checkpoints


def load_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Load the config of the run in a workdir.

  Raises:
    ValueError: there is no run, or the file is not a config.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise ValueError(
      f'{workdir}: no run here (no config.json); train one with '
      f'python train.py --config=FILE --workdir={workdir}'
    )
  parts = ('task', 'data', 'model', 'training')
  return ml_collections.ConfigDict(_read(path, *parts))


def load_data(workdir: pathlib.Path) -> dict:
  """Load the task's data record of the run in a workdir.

  Raises:
    ValueError: the file is missing or is not a data record.
  """
  return _read(workdir / 'data.json', 'sha256')


def data_to_resume(workdir: pathlib.Path, config) -> dict | None:
  """Load the data record if the workdir has a run to resume, else None.

  The run must have the same config.data and at least one checkpoint.
  """
  if not (workdir / 'config.json').exists():
    return None
  old = load_config(workdir).data.to_dict()
  is_same = old == config.data.to_dict()
  is_resumed = is_same and checkpoints.has_any(workdir / 'checkpoints')
  return load_data(workdir) if is_resumed else None


def _read(path, *keys):
  """Read a JSON object that must have the given keys."""
  try:
    record = json.loads(path.read_text())
  except FileNotFoundError:
    raise ValueError(f'{path}: no such file; restore it') from None
  except ValueError as error:
    raise ValueError(f'{path}: not JSON: {error}') from None
  if not isinstance(record, dict) or not record.keys() >= set(keys):
    raise ValueError(f'{path}: expected an object with {", ".join(keys)}')
  return record


def check(workdir: pathlib.Path, config, data: dict) -> str | None:
  """Check that a run may start or resume in a workdir.

  Args:
    workdir: folder of the run.
    config: the requested config.
    data: the task's data record.

  Returns:
    A note for the user, or None.

  Raises:
    Unusable: the workdir holds a run with another config or other data.
    ValueError: its records cannot be read.
  """
  if workdir.exists() and not workdir.is_dir():
    raise Unusable(f'{workdir}: expected a folder, got a file')
  if not (workdir / 'config.json').exists():
    return None
  old, new = _flatten(load_config(workdir)), _flatten(config)
  if not checkpoints.has_any(workdir / 'checkpoints'):
    if old == new:
      return None
    return f'{workdir}: no checkpoint of its previous config; starting afresh'
  free = tuple(f'training.{key}' for key in TrainingConfig.FREE)
  differences = [
    f'{key} {old.get(key, "unset")!r} → {new.get(key, "unset")!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not key.startswith(free)
  ]
  if differences:
    raise Unusable(
      f'{workdir}: holds a run with another config ({", ".join(differences)}); '
      'choose another --workdir, or use the same config'
    )
  old_data = load_data(workdir)
  if old_data['sha256'] != data['sha256']:
    raise Unusable(
      f'{workdir}: holds a run on other data (sha256 '
      f'{old_data["sha256"][:8]}… → {data["sha256"][:8]}…); choose another '
      '--workdir, or restore the data'
    )
  if old_data != data:
    raise Unusable(
      f'{workdir}/data.json: records another vocabulary of the same data; '
      'restore the file, or the version of tokenizers that the run started with'
    )
  before, after = old['training.steps'], new['training.steps']
  if before != after:
    return f'steps: {before:,} → {after:,}; the learning-rate schedule changes'
  return None


def write(workdir: pathlib.Path, config, data: dict) -> None:
  """Write the records of a run to its workdir."""
  workdir.mkdir(parents=True, exist_ok=True)
  for name, record in (
    # config.json comes last: if it exists, so do the others.
    ('env', _environment()),
    ('data', data),
    ('config', json.loads(config.to_json())),
  ):
    partial = workdir / f'{name}.json.part'
    partial.write_text(json.dumps(record, indent=2) + '\n')
    partial.replace(workdir / f'{name}.json')


def _flatten(config) -> dict:
  """Return {'model.num_layers': 4, …}, with values as in JSON."""

  def walk(prefix, value):
    if isinstance(value, dict):
      for key, part in value.items():
        yield from walk(f'{prefix}.{key}' if prefix else key, part)
    else:
      yield prefix, value

  return dict(walk('', json.loads(config.to_json())))


def versions() -> dict[str, str]:
  """Return the versions of Python and the packages that affect results."""
  packages = (
    'attention',
    'jax',
    'jaxlib',
    'dm-haiku',
    'optax',
    'numpy',
    'grain',
    'orbax-checkpoint',
  )
  found = {'python': platform.python_version()}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'not installed'
  return found


def _environment() -> dict:
  return {
    'versions': versions(),
    'backend': jax.default_backend(),
    'devices': [d.device_kind for d in jax.devices()],
    'platform': platform.platform(),
    'git_revision': _git_revision(),
    'command': sys.argv,
  }


def _git_revision() -> str | None:
  source = pathlib.Path(__file__).parent
  command = ['git', '-C', str(source), 'describe', '--always', '--dirty']
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=10, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
