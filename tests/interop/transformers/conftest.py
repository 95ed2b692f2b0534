"""Small models of every architecture, with weights from a frozen generator."""

import json
import pathlib
import types

import numpy as np
import pytest
from safetensors import numpy as safetensors

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'transformers'


def weights(shapes: dict) -> dict:
  """Weights far from where models start, the same in every NumPy version."""
  rng = np.random.RandomState(0)
  found = {}
  for key in sorted(shapes):
    shape = shapes[key]
    array = rng.standard_normal(shape)
    if len(shape) > 1:
      array /= np.sqrt(shape[-2] if 'experts' in key else shape[-1])
    else:
      is_scale = key.endswith('weight') and 'gemma' not in key
      array = 0.3 * array + is_scale
    found[key] = array.astype(np.float32)
  return found


def _record(name: str) -> dict:
  """What transformers computed for a model; see record.py."""
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


def write_folder(name: str, folder: pathlib.Path) -> dict:
  """Write a recorded model's folder; returns the record."""
  found = _record(name)
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(str(found['config']))
  arrays = weights(json.loads(str(found['shapes'])))
  safetensors.save_file(arrays, folder / 'model.safetensors')
  return found


@pytest.fixture
def published():
  """Recorded models: published.write_folder(name, folder)."""
  return types.SimpleNamespace(weights=weights, write_folder=write_folder)
