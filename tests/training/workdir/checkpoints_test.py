"""Checkpoints: damage is detected, and the previous checkpoint is used."""

import contextlib
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.training.workdir.checkpoints import Checkpoints


def _state(step):
  return {
    'params': {'a': {'w': jnp.full((17, 13), step, jnp.float32)}},
    'optimizer': (jnp.arange(7) + step, {'b': jnp.float32(step / 3)}),
  }


def _save(folder, *steps, num_kept=3, losses=()):
  with contextlib.closing(Checkpoints(folder, num_kept)) as checkpoints:
    for i, step in enumerate(steps):
      values = {'eval/loss': losses[i]} if losses else {}
      checkpoints.save(step, _state(step), values)


def _restore(folder):
  """Return (step, whether the state is that step's, warnings)."""
  warned = []
  with contextlib.closing(Checkpoints(folder, 3, warned.append)) as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
      return None, None, warned
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _state(0),
    )
    state = checkpoints.restore(step, like)
  same = jax.tree.map(
    lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(),
    state,
    _state(step),
  )
  return step, all(jax.tree.leaves(same)), warned


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, 5, num_kept=2, losses=(3.0, 1.0, 2.0, 2.0, 2.0))
  assert _names(tmp_path) == ['2', '4', '5']
  assert _restore(tmp_path) == (5, True, [])


def test_without_losses_only_the_newest_are_kept(tmp_path):
  _save(tmp_path, 1, 2, 3, 4, num_kept=2)
  assert _names(tmp_path) == ['3', '4']


def test_a_saved_step_is_kept_beside_later_ones(tmp_path):
  _save(tmp_path, 5, num_kept=1)
  _save(tmp_path, 3, num_kept=1)
  assert _names(tmp_path) == ['3', '5']


def test_a_step_that_is_being_saved_is_saved_once(tmp_path):
  warned = []
  with contextlib.closing(Checkpoints(tmp_path, 2, warned.append)) as saved:
    saved.save(1, _state(1))
    saved.save(1, _state(1))
  assert not warned
  assert _restore(tmp_path) == (1, True, [])


def test_later_steps_do_not_change_a_pending_save(tmp_path):
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1009, 101))
  with contextlib.closing(Checkpoints(tmp_path, 9)) as checkpoints:
    for step in range(4):
      checkpoints.save(step, {'params': {'w': x}})
      for _ in range(5):
        x = advance(x)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    checkpoints.wait()
    for step in range(4):
      restored = checkpoints.restore(step, {'params': {'w': like}})
      np.testing.assert_array_equal(restored['params']['w'], 5 * step)


def _faults(step: pathlib.Path, num_flips):
  """Yield (name, damaging function) for every file and for random bits."""
  files = sorted(path for path in step.rglob('*') if path.is_file())

  def cut(path):
    path.write_bytes(path.read_bytes()[:-1])

  def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)

  for path in files:
    name = path.relative_to(step)
    yield f'delete {name}', lambda path=path: path.unlink()
    if path.stat().st_size:
      yield f'cut {name}', lambda path=path: cut(path)
      yield f'empty {name}', lambda path=path: path.write_bytes(b'')
  # Choose bits uniformly over the whole checkpoint.
  sizes = [8 * path.stat().st_size for path in files]
  chance = random.Random(0)
  for path in chance.choices(files, sizes, k=num_flips):
    bit = chance.randrange(8 * path.stat().st_size)
    yield f'flip {path.name} {bit}', lambda p=path, b=bit: flip(p, b)


def _check_faults(folder, faults_every, num_flips):
  _save(folder / 'good', 10, 20)
  copy = folder / 'copy'
  shutil.copytree(folder / 'good', copy)
  names = [name for name, _ in _faults(copy / '20', num_flips)]
  detected = 0
  for i in range(0, len(names), faults_every):
    shutil.rmtree(copy)
    shutil.copytree(folder / 'good', copy)
    dict(_faults(copy / '20', num_flips))[names[i]]()
    step, is_right, warned = _restore(copy)
    assert is_right, names[i]
    if step == 10:
      detected += 1
      assert len(warned) == 1, names[i]
      assert 'checkpoint 20 is damaged' in warned[0]
      assert _names(copy / 'damaged') == ['20']
    else:
      assert step == 20, names[i]
  return detected, len(range(0, len(names), faults_every))


def test_damage_is_detected_and_the_previous_step_restored(tmp_path):
  detected, tried = _check_faults(tmp_path, faults_every=13, num_flips=100)
  assert detected == tried > 10


@pytest.mark.slow
def test_all_damage_is_detected(tmp_path):
  detected, tried = _check_faults(tmp_path, faults_every=1, num_flips=200)
  print(f'{detected} of {tried} faults detected')
  assert detected == tried


def test_a_step_without_its_manifest_is_unfinished(tmp_path):
  _save(tmp_path, 3, 4)
  (tmp_path / '4' / 'manifest.json').unlink()
  (tmp_path / '5.part').mkdir()
  step, is_right, warned = _restore(tmp_path)
  assert (step, is_right) == (3, True)
  assert 'checkpoint 4 is damaged (unfinished' in warned[0]
  assert _names(tmp_path) == ['3', 'damaged']


def test_latest_step_is_none_if_all_are_damaged(tmp_path):
  _save(tmp_path, 3, 4)
  for step in ('3', '4'):
    (tmp_path / step / 'manifest.json').write_text('{}')
  step, _, warned = _restore(tmp_path)
  assert step is None
  assert len(warned) == 2
  assert _names(tmp_path / 'damaged') == ['3', '4']


def test_a_reader_moves_nothing(tmp_path):
  _save(tmp_path, 3, 4)
  (tmp_path / '4' / 'manifest.json').unlink()
  (tmp_path / '5.part').mkdir()
  warned = []
  assert Checkpoints(tmp_path, warn=warned.append).latest_step() == 3
  assert len(warned) == 1
  assert _names(tmp_path) == ['3', '4', '5.part']
