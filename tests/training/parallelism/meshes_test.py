"""All meshes give the same losses, and checkpoints move between meshes."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from attention.training.parallelism import sharding

_MESHES = {
  'one': dict(data=1),
  'data 8': dict(data=8),
  'fsdp 8': dict(data=1, fsdp=8),
  'data 2 × fsdp 2 × tensor 2': dict(data=2, fsdp=2, tensor=2),
  'context 8': dict(data=1, context=8),
  'data 4 × context 2': dict(data=4, context=2),
  'data 2 × tensor 2 × context 2': dict(data=2, tensor=2, context=2),
}
# Trains on each mesh, and resumes from the previous mesh's checkpoint. Meshes
# of several devices take half of their steps in one call, one device none.
_TRAIN = """
import contextlib, dataclasses, json, pathlib, sys
import jax
import numpy as np
jax.config.update('jax_num_cpu_devices', 8)
from attention.modules import lora
from attention.training import command_line, tasks
from attention.training.optimization import optimizers, precision
from attention.training.parallelism import sharding
from attention.training.workdir.checkpoints import Checkpoints
from attention.training.training_config import TrainingConfig
from attention.training.optimization.step import Step

workdir, steps, meshes, rank, name, policy = json.loads(sys.argv[1])
precision.applied(policy).__enter__()
config = command_line.load_config(f'configs/{name}.py:debug')
if name == 'gpt_char':
  config.data.update(path=f'{workdir}/text.txt', batch_size=16)
else:
  config.model.update(num_blocks=1, num_extra_blocks=0)
settings = TrainingConfig.create(config.training.to_dict())
optimizer, schedule = optimizers.adamw(steps=20, **config.optimizer)
if rank:
  config.model.lora = {'rank': rank}
task = tasks.create(config)
if rank:
  task.is_trained = lora.is_adapter

def train(step, state, span, size):
  losses = []
  for n in span[::size]:
    batches = [task.batch(i) for i in span if n <= i < n + size]
    stacked = step.stack(batches)
    program = step.compile(stacked).result()
    state, values = step.run(program, state, stacked, n, len(batches))
    losses += np.asarray(values['train/loss'])[:len(batches)].tolist()
  return losses, state

results, before = {}, None
for name, axes in meshes.items():
  mesh = sharding.make_mesh(task.batch_size, **axes)
  half = steps // 2
  size = 1 if name == 'one' else half
  settings = dataclasses.replace(settings, steps_per_call=size)
  step = Step(task, optimizer, schedule, 0, mesh, settings)
  first, state = train(step, step.init(), range(half), 1)
  leaves = jax.tree.leaves(state)
  held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
  whole = sum(x.nbytes for x in leaves)
  checkpoints = Checkpoints(pathlib.Path(workdir) / name, 1)
  with contextlib.closing(checkpoints):
    checkpoints.save(half, state)
  second, _ = train(step, state, range(half, steps), size)
  results[name] = {'losses': first + second, 'held': held / whole}
  if before:
    checkpoints = Checkpoints(pathlib.Path(workdir) / before)
    with contextlib.closing(checkpoints):
      state = checkpoints.restore(half, step.like)
    results[name]['moved'] = train(step, state, range(half, steps), 1)[0]
  before = name
print(json.dumps(results))
"""


def _train(
  python,
  text,
  steps,
  meshes,
  rank=0,
  name='gpt_char',
  rtol=2e-6,
  precision='',
):
  words = json.dumps([str(text.parent), steps, meshes, rank, name, precision])
  output, error = python('-c', _TRAIN, words).communicate(timeout=900)
  assert output, error
  results = json.loads(output)
  whole = np.array(results['one']['losses'])
  assert len(whole) == steps
  for result in results.values():
    np.testing.assert_allclose(result['losses'], whole, rtol=rtol)
    if 'moved' in result:
      np.testing.assert_allclose(
        result['moved'], whole[steps // 2 :], rtol=rtol
      )
  return results


def test_a_mixed_mesh_matches_one_device_and_restores_its_checkpoint(
  python, text
):
  mixed = 'data 2 × fsdp 2 × tensor 2'
  meshes = {name: _MESHES[name] for name in ('one', mixed)}
  results = _train(python, text, 6, meshes)
  assert results['one']['held'] == 1
  assert results[mixed]['held'] < 0.45


def test_products_in_bfloat16_on_meshes_match_one_device(
  python, tmp_path, text
):
  shutil.copy(text, tmp_path)
  names = (
    'one',
    'data 8',
    'data 2 × fsdp 2 × tensor 2',
    'data 2 × tensor 2 × context 2',
  )
  _train(
    python,
    tmp_path / text.name,
    4,
    {name: _MESHES[name] for name in names},
    # Another order of sums changes the rounding of the next operands.
    rtol=1e-3,
    precision='products=bfloat16',
  )


def test_low_rank_updates_on_a_mixed_mesh_match_one_device(
  python, tmp_path, text
):
  shutil.copy(text, tmp_path)
  mixed = 'data 2 × fsdp 2 × tensor 2'
  meshes = {name: _MESHES[name] for name in ('one', mixed)}
  results = _train(python, tmp_path / text.name, 6, meshes, rank=2)
  losses = results['one']['losses']
  assert losses[-1] < losses[0]


def test_a_mesh_that_cuts_positions_matches_one_device(python, text):
  meshes = {'one': _MESHES['one'], 'context 4': dict(data=2, context=4)}
  _train(python, text, 4, meshes)


def test_a_mesh_that_cuts_pairs_matches_one_device(python, tmp_path):
  meshes = {'one': _MESHES['one'], 'pairs 4': dict(data=2, pairs=4)}
  # At first all terms of the loss are equal, and their float32 sum on one
  # device is off by 5e-6.
  _train(python, tmp_path / 'text.txt', 4, meshes, name='msa', rtol=5e-6)


def test_a_mesh_that_cuts_pairs_needs_a_model_of_pairs():
  mesh = jax.sharding.AbstractMesh((2,), ('pairs',))
  with pytest.raises(ValueError, match='training.mesh.pairs: expected 1'):
    sharding.check_pairs(object(), mesh)


@pytest.mark.slow
def test_all_meshes_give_the_same_losses(python, text):
  results = _train(python, text, 20, _MESHES)
  whole = np.array(results['one']['losses'])
  for name, result in results.items():
    largest = np.abs(np.array(result['losses']) / whole - 1).max()
    print(f'{name:30}{largest:.1e}  holds {result["held"]:.0%} of the state')
  assert results['fsdp 8']['held'] < 0.3


def test_heads_and_feed_forward_shard_over_tensor_the_rest_over_fsdp():
  mesh = jax.sharding.AbstractMesh((1, 2, 2), ('data', 'fsdp', 'tensor'))
  names = {
    'gpt/block_0/attention/qkv//w': ((6, 18), ('fsdp', 'tensor')),
    'gpt/block_0/attention/qkv//b': ((18,), ('tensor',)),
    'gpt/block_0/attention/linear//w': ((6, 10), ('tensor', 'fsdp')),
    'gpt/block_0/attention/linear//b': ((10,), (None,)),
    'gpt/block_0/expand//w': ((6, 7), ('fsdp', None)),
    'gpt/block_0/contract//w': ((24, 6), ('tensor', 'fsdp')),
    'gpt/block_0/contract//lora_a': ((24, 3), ('tensor', None)),
    'gpt/block_0/contract//lora_b': ((3, 6), (None, 'fsdp')),
    'gpt/block_0/gate//lora_a': ((6, 3), ('fsdp', None)),
    'gpt/block_0/gate//lora_b': ((3, 24), (None, 'tensor')),
    'gpt/tokens//embeddings': ((13, 6), (None, 'fsdp')),
    'evoformer/attention//query_w': ((6, 4, 3), ('fsdp', 'tensor', None)),
    'evoformer/attention//output_w': ((4, 3, 8), ('tensor', None, 'fsdp')),
  }
  shapes = {}
  for name, (shape, _) in names.items():
    module, leaf = name.split('//')
    x = jax.ShapeDtypeStruct(shape, np.float32)
    shapes.setdefault(module, {})[leaf] = x
  state = {'params': shapes, 'optimizer': ({'mu': shapes}, np.int32(0))}
  placed = sharding.of_state(state, mesh)
  for name, (_, axes) in names.items():
    module, leaf = name.split('//')
    for part in (placed['params'], placed['optimizer'][0]['mu']):
      assert part[module][leaf].sharding.spec == PartitionSpec(*axes), name


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    (dict(fsdp=0), 'training.mesh.fsdp: expected 1 or more, got 0'),
    (dict(tensor=999), 'expected at most .* 1 × 1 × 999 × 1 × 1'),
    (dict(data=0), 'training.mesh.data: expected 1 or more, or -1'),
  ],
)
def test_invalid_meshes_raise(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(16, **axes)


def test_data_uses_as_many_devices_as_divide_the_batch():
  mesh = sharding.make_mesh(7 * len(jax.devices()))
  assert isinstance(mesh, Mesh)
  others = {'fsdp': 1, 'tensor': 1, 'context': 1, 'pairs': 1}
  assert mesh.shape == {'data': len(jax.devices()), **others}
