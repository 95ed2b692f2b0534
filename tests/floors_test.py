"""Rooms import strictly lower floors, or themselves."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_FLOORS = {
  'ops': 0,
  'data': 0,
  'modules': 1,
  'decoding': 1,
  'models': 2,
  'sites': 2,
  'capture': 4,
  'edit': 3,
  'analysis': 5,
  'interop': 3,
  'plots': 3,
  'training': 6,
  'commands': 7,
  '__main__': 8,
}
_SOURCES = sorted((_ROOT / 'attention').rglob('*.py'))


def _room(path):
  return path.relative_to(_ROOT / 'attention').parts[0].removesuffix('.py')


def _imports(path):
  """The rooms of the library that a file imports, and all top-level names."""
  rooms, packages = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names = [node.module]
      if node.module == 'attention':
        names = [f'attention.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    for name in names:
      parts = name.split('.')
      packages.add(parts[0])
      if parts[0] == 'attention' and len(parts) > 1:
        rooms.add(parts[1])
  return rooms, packages


def test_every_source_file_is_on_a_floor():
  rooms = {_room(p) for p in _SOURCES} - {'__init__'}
  assert rooms <= _FLOORS.keys()


@pytest.mark.parametrize('path', _SOURCES, ids=lambda p: str(p.stem))
def test_imports_go_down_or_stay(path):
  room = _room(path)
  if room == '__init__':
    return
  for imported in _imports(path)[0]:
    is_lower = _FLOORS[imported] < _FLOORS[room]
    assert imported == room or is_lower, f'{path}: imports {imported}'


def test_ops_know_neither_haiku_nor_data():
  for path in (_ROOT / 'attention' / 'ops').rglob('*.py'):
    assert _imports(path)[1] <= {
      *sys.stdlib_module_names,
      'attention',
      'jax',
      'jaxtyping',
      'numpy',
    }


def test_configs_import_ml_collections_only():
  for path in (_ROOT / 'configs').glob('*.py'):
    assert _imports(path)[1] == {'ml_collections'}, path


def test_importing_the_library_brings_nothing_heavy():
  code = (
    'import sys, jax, haiku, numpy; before = set(sys.modules); '
    'settings = dict(jax.config.values); import attention; '
    'assert settings == jax.config.values, "settings changed"; '
    'print(*(set(sys.modules) - before))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  brought = {name.split('.')[0] for name in done.stdout.split()}
  heavy = {'absl', 'grain', 'matplotlib', 'ml_collections', 'optax', 'orbax'}
  assert 'attention' in brought
  assert not brought & (heavy | {'rich'})
