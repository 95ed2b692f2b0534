"""An Evoformer over several devices: the same numbers, in less memory each."""

import json
import pathlib
import subprocess
import sys

import pytest

# Runs each case on one device and over four for each family, and reports the
# largest errors of outputs and gradients, relative to the largest value or 1,
# and the collectives as [kind, shape].
_COMPARE = """
import json, re, sys
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
sys.path.append(sys.argv[1])
from alphafold_test import _config, _global_config
from attention.interop import alphafold
from attention.modules.evoformer import EvoformerBlock, EvoformerStack
from attention.ops import mapping

jax.config.update('jax_num_cpu_devices', 8)
mapping._POSITIONS = 24  # blocks of two rows
BATCH = 'data', 'fsdp'
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)

def ours(kind, **fields):
  fields = dict(num_intermediate_channel=12) | fields
  layer = kind(
    num_msa_head=2, num_outer_channel=3, num_intermediate_factor=2,
    zero_init=False, **fields)
  return lambda *x: layer(*x, is_training=True)

def theirs():
  layer = alphafold.EvoformerIteration(_config(), _global_config(), False)
  def call(msa, pair, *masks):
    act = layer(dict(msa=msa, pair=pair), dict(zip(('msa', 'pair'), masks)))
    return act['msa'], act['pair']
  return call

# name: (sequences, residues, families, module)
cases = {
  'families': (8, 12, 2, lambda: ours(EvoformerBlock)),
  'ragged, whole': (6, 13, 0, lambda: ours(
    EvoformerBlock, is_extra_msa=True, fuse_projection_weights=True,
    outer_first=True, remat=False, num_intermediate_channel=11)),
  'ragged stack': (6, 13, 0, lambda: ours(
    EvoformerStack, num_blocks=2, is_extra_msa=True)),
  'whole stack': (4, 8, 0, lambda: ours(
    EvoformerStack, num_blocks=2, remat=False)),
  'alphafold': (4, 8, 0, theirs),
}

def run(model, families, *inputs):
  def gradients(params, act, masks, d_act):
    def apply(params, act):
      call = lambda *x: model.apply(params, jax.random.key(3), *x)
      if families:
        in_pairs = jax.sharding.get_abstract_mesh().shape.get('pairs')
        call = jax.vmap(call, spmd_axis_name=BATCH if in_pairs else None)
      return list(call(*act, *masks))
    act, vjp = jax.vjp(apply, params, act)
    return act, vjp(d_act)
  options = {'xla_backend_optimization_level': 0}
  program = jax.jit(gradients).lower(*inputs).compile(options)
  return jax.tree.leaves(program(*inputs)), program.as_text()

results = {}
for name in sys.argv[2:]:
  s, n, families, module = cases[name]
  lead = (families,) if families else ()
  shapes = (*lead, s, n, 12), (*lead, n, n, 8)
  act, d_act = ([draw(*shape) for shape in shapes] for _ in range(2))
  masks = [jnp.asarray(rng.random(x.shape[:-1]) < 0.8) for x in act]
  model = hk.transform(lambda *x: module()(*x))
  one = [x[0] if families else x for x in (*act, *masks)]
  params = jax.tree.map(
    lambda x: 0.2 * draw(*x.shape),
    jax.eval_shape(model.init, jax.random.key(0), *one))
  inputs = params, act, masks, d_act
  whole, _ = run(model, families, *inputs)
  sizes, types = (max(1, families), 1, 4), (AxisType.Auto,) * 3
  mesh = jax.make_mesh(sizes, (*BATCH, 'pairs'), axis_types=types)
  with jax.set_mesh(mesh):
    cut, text = run(model, families, *inputs)
  found = re.findall(
    r'= (.*?) (all-[a-z\\-]*[a-z]|collective-permute|reduce-scatter)[(]', text)
  results[name] = {
    'error': max(
      float(abs(np.asarray(a) - np.asarray(b)).max() / max(1, abs(a).max()))
      for a, b in zip(whole, cut, strict=True)),
    'collectives': sorted({
      (kind, shape) for shapes, kind in found
      for shape in re.findall(r'[a-z0-9]+\\[[\\d,]*\\]', shapes)}),
  }
print(json.dumps(results))
"""
_MEMORY = """
import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from attention.modules.evoformer import EvoformerBlock

jax.config.update('jax_num_cpu_devices', 4)
model = hk.transform(lambda *act: EvoformerBlock(
  num_msa_head=2, num_pair_head=2, num_outer_channel=4,
  num_intermediate_channel=16)(*act))
act = [jax.ShapeDtypeStruct((160, 160, 16), jnp.float32)] * 2
params = jax.eval_shape(model.init, jax.random.key(0), *act)

def gradients(params, act, d_act):
  apply = lambda params, act: list(model.apply(params, None, *act))
  return jax.vjp(apply, params, act)[1](d_act)

for count in (1, 4):
  mesh = jax.make_mesh(
    (count,), ('pairs',), axis_types=(AxisType.Auto,),
    devices=jax.devices()[:count])
  rows, whole = (
    NamedSharding(mesh, PartitionSpec(*x)) for x in (['pairs'], []))
  with jax.set_mesh(mesh):
    memory = jax.jit(
      gradients, in_shardings=(whole, rows, rows), out_shardings=(whole, rows)
    ).lower(params, act, act).compile().memory_analysis()
  print(memory.temp_size_in_bytes + memory.argument_size_in_bytes
        + memory.output_size_in_bytes)
"""


def _run(script, *words):
  folder = pathlib.Path(__file__).parents[1] / 'interop'
  done = subprocess.run(
    [sys.executable, '-c', script, folder, *words],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def compared():
  return json.loads(_run(_COMPARE, 'families', 'ragged, whole'))


def test_devices_compute_what_one_does(compared):
  assert len(compared) == 2
  for name, case in compared.items():
    assert case['error'] < 2e-6, name


@pytest.mark.slow
def test_devices_compute_what_one_does_in_stacks_and_in_alphafold():
  names = 'ragged stack', 'whole stack', 'alphafold'
  for name, case in json.loads(_run(_COMPARE, *names)).items():
    assert case['error'] < 2e-6, name


def test_only_biases_are_gathered(compared):
  kinds = {}
  for kind, shape in compared['families']['collectives']:
    kinds.setdefault(kind, set()).add(shape)
  # The last one is a mask.
  biases = {'f32[1,2,12,12]', 'f32[1,4,12,12]', 'f32[1,8,12]'}
  assert kinds.pop('all-gather') == biases
  sums = {'f32[1,2,3,12]', 'f32[1,4,3,12]'}
  assert kinds.pop('reduce-scatter') == sums
  # Right factors of the outer product travel.
  assert kinds.pop('collective-permute') == {'f32[1,3,8,3]'}
  # Moves between rows, columns and channels, and gradients of parameters.
  assert kinds.keys() == {'all-to-all', 'all-reduce'}
  pairs = {'f32[1,3,12,8]', 'f32[1,12,3,8]', 'f32[1,12,12,8]'}
  assert not kinds['all-reduce'] & pairs


def test_memory_is_divided_among_devices():
  one, four = map(int, _run(_MEMORY).split())
  assert four <= 0.36 * one
