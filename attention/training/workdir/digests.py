"""manifest.json of a finished folder, with a digest of every file."""

import hashlib
import json
import pathlib

_NAME = 'manifest.json'


def write(folder: pathlib.Path, record: dict) -> None:
  """Write a manifest: a record, and the size and digest of every file."""
  body = {**record, 'files': _digests(folder)}
  (folder / _NAME).write_text(json.dumps({**body, 'sha256': _seal(body)}))


def read(folder: pathlib.Path) -> dict:
  """Read a folder's manifest without checking the files.

  Raises:
    ValueError: the manifest is missing or has been altered.
  """
  try:
    body = json.loads((folder / _NAME).read_bytes())
    seal = body.pop('sha256')
  except FileNotFoundError:
    raise ValueError('unfinished: no manifest.json') from None
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise ValueError(f'manifest.json: {error or type(error)}') from error
  if seal != _seal(body):
    raise ValueError('manifest.json: contents have changed')
  return body


def check(folder: pathlib.Path) -> dict:
  """Read a folder's manifest and check every file against it.

  Raises:
    ValueError: a file is missing or has been altered; the message names it.
  """
  record = read(folder)
  found = _digests(folder)
  for name, digest in record['files'].items():
    if name not in found:
      raise ValueError(f'{name}: missing')
    if found[name] != digest:
      raise ValueError(f'{name}: contents have changed')
  return record


def _digests(folder):
  """Return {name: [size in bytes, sha256]}."""
  found = {}
  for path in sorted(folder.rglob('*')):
    name = path.relative_to(folder).as_posix()
    if path.is_file() and name != _NAME:
      with path.open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      found[name] = [path.stat().st_size, digest]
  return found


def _seal(body):
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
