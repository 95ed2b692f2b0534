"""Notebooks: what is in the repository; that they run from a clean kernel."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_NOTEBOOKS = sorted(
  (_ROOT / 'notebooks').glob('*.ipynb'),
  key=lambda p: int(p.name.partition('_')[0]),
)
_each = pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda p: p.stem)


def test_there_are_notebooks():
  numbers = [int(p.name.partition('_')[0]) for p in _NOTEBOOKS]
  assert numbers == list(range(1, 11))


@_each
def test_a_notebook_was_run_from_top_to_bottom_and_shows_pictures(path):
  text = path.read_text()
  assert len(text) < 1_500_000
  cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
  numbers = [cell['execution_count'] for cell in cells]
  assert numbers == list(range(1, len(cells) + 1))
  outputs = [output for cell in cells for output in cell['outputs']]
  assert not [x for x in outputs if x['output_type'] == 'error']
  assert [x for x in outputs if 'image/png' in x.get('data', {})]
  assert any('assert ' in line for cell in cells for line in cell['source'])
  written = json.dumps([x for x in outputs if x['output_type'] == 'stream'])
  assert not re.search(r'/(tmp|home|root|usr|work)/|Warning', written)


@pytest.mark.slow
@_each
def test_a_notebook_runs_from_a_clean_kernel(path):
  pytest.importorskip('nbmake')
  command = [sys.executable, '-m', 'pytest', '--nbmake', '--nbmake-timeout=900']
  # On its own: the options of this suite are for tests, not for notebooks.
  command += ['-c', os.devnull, '-p', 'no:cacheprovider', '-q', str(path)]
  done = subprocess.run(
    command,
    cwd=_ROOT,
    env={**os.environ, 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-3000:]
