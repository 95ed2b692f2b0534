"""The compilation cache: truncated entries are removed."""

import os
import subprocess
import sys
import zlib

import pytest

from attention.training import compilation_cache

_COMPILE = """
import sys, jax
from attention.training import compilation_cache
compilation_cache.use_cache()
print(jax.jit(lambda x: x * 2 + 1)(20).item())
"""


def _compile(folder):
  done = subprocess.run(
    [sys.executable, '-c', _COMPILE],
    env=os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == '41\n'
  return done.stderr


def test_truncated_entries_are_replaced_without_warning(tmp_path):
  assert not _compile(tmp_path)
  before = {p.name: p.read_bytes() for p in tmp_path.glob('*-cache')}
  assert before
  for name, content in before.items():
    (tmp_path / name).write_bytes(content[: len(content) // 2])
  assert not _compile(tmp_path)
  after = {p.name: p.read_bytes() for p in tmp_path.glob('*-cache')}
  assert after.keys() == before.keys()
  for name, content in after.items():
    assert len(content) > 0.9 * len(before[name])


def test_only_new_entries_are_checked(tmp_path, monkeypatch):
  whole = zlib.compress(b'a program' * 100)
  (tmp_path / 'a-cache').write_bytes(whole)
  (tmp_path / 'b-cache').write_bytes(whole[:-1])
  (tmp_path / 'c-cache').write_bytes(b'')
  (tmp_path / 'c-atime').write_bytes(b'')
  assert compilation_cache.remove_truncated(tmp_path) == 2
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['a-cache', 'c-atime', 'checked']
  os.utime(tmp_path / 'a-cache', (0, 0))
  monkeypatch.setattr(compilation_cache, '_is_whole', pytest.fail)
  assert compilation_cache.remove_truncated(tmp_path) == 0


def test_a_missing_cache_folder_is_created(tmp_path):
  assert compilation_cache.remove_truncated(tmp_path / 'new' / 'cache') == 0
  assert (tmp_path / 'new' / 'cache').is_dir()
