"""Attention between positions that are cut over devices."""

import json
import subprocess
import sys

import pytest

# Runs each case on one device and over several, and reports the largest errors,
# relative to the largest value, of outputs and gradients.
_COMPARE = """
import json, re, sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import attention
from attention import Mask
from attention.ops.implementations import ring

ring._LEAST = 4  # the ring sends several pieces
jax.config.update('jax_num_cpu_devices', 4)
B, T, H, G, D, E = 2, 32, 4, 2, 3, 5
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
qkv = draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, E)
d_output = draw(B, T, H, E)
rows = P(None, None, 'c')  # queries of [b, h, q, k]
ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, T))))
dense = jnp.asarray(rng.random((B, 1, T, T)) < 0.6)
lengths = Mask.lengths(key_lengths=np.array([0, 17]))
# name: (arrays and their specs, function of the arrays -> arguments)
cases = {
  'bias, segments, sinks': (
    [(draw(1, H, T, T), rows), (draw(H), P()), (ids, P(None, 'c'))],
    lambda bias, sinks, ids: dict(
      bias=bias, sinks=sinks, mask=Mask.segments(ids), is_causal=True),
  ),
  'dense mask, cap, bias of keys': (
    [(draw(B, H, 1, T), P()), (dense, rows)],
    lambda bias, mask: dict(bias=bias, mask=mask, logit_cap=0.7),
  ),
  'buckets, prefix, dropout': (
    [(draw(32, H), P())],
    lambda table: dict(
      bias=attention.relative_buckets(table), mask=Mask.prefix(9),
      dropout_rate=0.3, dropout_rng=jax.random.key(1)),
  ),
  'alibi, window, lengths': (
    [], lambda: dict(bias=attention.alibi(H), mask=Mask.window(7, 2) & lengths),
  ),
}
def stripe(x, axis, parts):
  shape = x.shape[:axis] + (x.shape[axis] // parts, parts) + x.shape[axis + 1:]
  return jnp.moveaxis(x.reshape(shape), axis + 1, axis).reshape(x.shape)

def gradients(attend, arrays):
  floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
  def of_floats(*floats):
    given = iter(floats)
    return attend(*[
      next(given) if jnp.issubdtype(x.dtype, jnp.floating) else x
      for x in arrays])
  output, vjp = jax.vjp(of_floats, *floats)
  return output, *vjp(d_output)

results = {}
for name, (arrays, arguments) in cases.items():
  arrays, specs = zip(*arrays) if arrays else ((), ())
  one = jax.jit(lambda *x: gradients(
    lambda q, k, v, *more: attention.dot_product_attention(
      q, k, v, implementation='reference', **arguments(*more)), x)
  )(*qkv, *arrays)
  for layout, method, N in (
    ('contiguous', 'ring', 4), ('striped', 'ring', 4), ('contiguous', None, 2),
  ):
    cut = P(None, 'c')
    mesh = jax.make_mesh((N,), ('c',), axis_types=(AxisType.Auto,),
                         devices=jax.devices()[:N])
    over = jax.shard_map(
      lambda q, k, v, *more: attention.context_attention(
        q, k, v, axis_name='c', layout=layout, method=method,
        **arguments(*more)),
      mesh=mesh, in_specs=(cut, cut, cut, *specs), out_specs=cut,
      check_vma=False)
    def attend(*x):
      if layout == 'contiguous':
        return over(*x)
      axes = [tuple(s).index('c') if 'c' in s else None
              for s in (cut, cut, cut, *specs)]
      x = [y if a is None else stripe(y, a, N)
           for y, a in zip(x, axes, strict=True)]
      return stripe(over(*x), 1, T // N)
    program = jax.jit(lambda *x: gradients(attend, x)).lower(
      *qkv, *arrays).compile()
    results[f'{name}, {layout} {method}'] = {
      'errors': [float(abs(a - b).max() / abs(a).max())
                 for a, b in zip(one, program(*qkv, *arrays), strict=True)],
      'collectives': sorted(set(re.findall(
        r'(all-[a-z-]+|collective-permute|reduce-scatter)(?:-start)?[(]',
        program.as_text()))),
    }
print(json.dumps(results))
"""
# The second device first meets keys of its own, which are all masked.
_HIDDEN = """
import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import attention
jax.config.update('jax_num_cpu_devices', 2)
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 2, 4))
mask = np.ones((16, 16), bool)
mask[:, 8:] = False
cut = P(None, 'c')
over = jax.shard_map(
  lambda q, k, v, mask: attention.context_attention(
    q, k, v, axis_name='c', method='ring', mask=mask),
  mesh=jax.make_mesh((2,), ('c',), axis_types=(AxisType.Auto,)),
  in_specs=(cut, cut, cut, P('c')), out_specs=cut, check_vma=False)
one = lambda q, k, v: attention.dot_product_attention(
  q, k, v, mask=mask, implementation='reference')
def run(attend):
  return jax.jit(lambda *x: jax.tree.leaves(
    jax.value_and_grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))(*x))
    + [attend(*x)])(q, k, v)
for x, y in zip(run(lambda *x: over(*x, mask)), run(one), strict=True):
  np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
"""
# Compares kernels in a ring of two devices, in interpret mode, to one device.
_KERNELS = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P
import attention
from attention import Mask
from attention.ops.arguments import check
from attention.ops.implementations import fused, ring

jax.config.update('jax_num_cpu_devices', 2)
kernels = {'gpu': fused.Triton(True), 'tpu': fused.Tpu(True, 128)}[sys.argv[1]]
ring._LEAST = 32  # the ring sends several pieces
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
T, H, G, D = 128, 2, 1, 32
arrays = (draw(1, T, H, D), draw(1, T, G, D), draw(1, T, G, D), draw(32, H),
          draw(1, H, T, T))
d_output = draw(1, T, H, D)
more = dict(dropout_rate=0.3, dropout_rng=jax.random.key(1))
cases = (
  (False, lambda q, k, v, _, bias: ((q, k, v), dict(
    bias=bias, is_causal=True, mask=Mask.lengths(key_lengths=np.array([99]))))),
  (True, lambda q, k, v, table, _: ((q, k, v), dict(
    bias=attention.relative_buckets(table), mask=Mask.window(40, 9), **more))),
)

def stripe(x, parts):
  return x.reshape(1, -1, parts, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

def gradients(attend):
  output, vjp = jax.vjp(attend, *arrays)
  return output, *vjp(d_output)

def over_devices(is_striped, case):
  def local(*arrays):
    arrays, arguments = case(*arrays)
    checked = check(*arrays, num_shards=2, **arguments)
    return ring.Ring('c', kernels, is_striped)(*checked)
  cut = P(None, 'c')
  over = jax.shard_map(
    local, in_specs=(cut, cut, cut, P(), P(None, None, 'c')), out_specs=cut,
    mesh=jax.make_mesh((2,), ('c',), axis_types=(AxisType.Auto,)),
    check_vma=False)
  def attend(*arrays):
    if not is_striped:
      return over(*arrays)
    qkv = [stripe(x, 2) for x in arrays[:3]]
    return stripe(over(*qkv, *arrays[3:]), T // 2)
  return attend

def on_one(case):
  def attend(*arrays):
    arrays, arguments = case(*arrays)
    return attention.dot_product_attention(
      *arrays, implementation='reference', **arguments)
  return attend

for is_striped, case in cases:
  one = jax.jit(lambda: gradients(on_one(case)))()
  over = jax.jit(lambda: gradients(over_devices(is_striped, case)))()
  for a, b in zip(one, over, strict=True):
    print(float(abs(a - b).max() / jnp.maximum(abs(a).max(), 1e-30)))
"""
_MEMORY = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import attention

jax.config.update('jax_num_cpu_devices', 8)
mesh = jax.make_mesh((8,), ('c',), axis_types=(AxisType.Auto,))
x = jax.ShapeDtypeStruct((1, 65536, 8, 64), jnp.float32)
cut = P(None, 'c')
ring = jax.shard_map(
  lambda *x: attention.context_attention(
    *x, axis_name='c', is_causal=True, method='ring', layout='striped'),
  mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=False)
one = lambda *x: attention.dot_product_attention(*x, is_causal=True)
for attend in (one, ring):
  gradient = lambda *x: jax.vjp(attend, *x[:3])[1](x[3])
  memory = jax.jit(gradient).lower(x, x, x, x).compile().memory_analysis()
  print(memory.temp_size_in_bytes + memory.argument_size_in_bytes
        + memory.output_size_in_bytes)
"""


def _run(script, *words):
  done = subprocess.run(
    [sys.executable, '-c', script, *words], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def compared():
  return json.loads(_run(_COMPARE))


def test_devices_compute_together_what_one_does(compared):
  assert len(compared) == 12
  for name, case in compared.items():
    assert max(case['errors']) < 2e-6, name


def test_only_keys_and_values_travel(compared):
  for name, case in compared.items():
    if 'contiguous' in name:  # the test itself stripes arrays
      # Gradients of what all devices share are summed.
      allowed = {'collective-permute', 'all-reduce', 'all-to-all'}
      if 'segments' in name and 'None' in name:
        allowed.add('all-gather')  # of ids
      assert {*case['collectives']} <= allowed, name
  heads = [
    n
    for n, c in compared.items()
    if 'None' in n and 'collective-permute' not in c['collectives']
  ]
  assert {n.split()[0] for n in heads} == {'bias,', 'alibi,'}


@pytest.mark.parametrize('device', ['gpu', 'tpu'])
def test_kernels_run_inside_a_ring(device):
  errors = [float(x) for x in _run(_KERNELS, device).split()]
  assert len(errors) == 12
  assert max(errors) < 2e-6


def test_memory_is_divided_among_devices():
  one, ring = map(int, _run(_MEMORY).split())
  # A piece of keys, values and gradients is there more than once.
  assert ring <= 1.15 / 8 * one


def test_a_first_piece_of_masked_keys_adds_nothing():
  result = subprocess.run(
    [sys.executable, '-c', _HIDDEN], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
