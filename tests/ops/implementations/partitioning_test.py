"""Programs that XLA partitions over several devices."""

import json
import pathlib
import subprocess
import sys

import pytest

# Runs each case on one device and partitioned over four, and reports the errors
# and the compiled text.
_COMPARE = """
import json
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import attention
from attention import Mask
from attention.ops.mapping import map_rows

jax.config.update('jax_num_cpu_devices', 4)
mesh = Mesh(
  np.array(jax.devices()).reshape(2, 2), ('batch', 'heads'),
  axis_types=(AxisType.Auto,) * 2,
)
B, Q, K, H, D, E = 6, 10, 14, 4, 3, 5
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype('f')
q, k, v, bias, ct = (
  draw(B, Q, H, D), draw(B, K, H, D), draw(B, K, H, E), draw(H, Q, K),
  draw(B, Q, H, E),
)
lengths = Mask.lengths(None, np.array([3, 14, 9, 4, 1, 0]))
segments = Mask.segments(np.arange(B * Q).reshape(B, Q) // 4,
                         np.arange(B * K).reshape(B, K) // 4)
cases = {
  'bias': (q, k, v, bias, {}),
  'bias of rows': (q, k, v, draw(B, 1, Q, K), dict(mask=lengths)),
  'shared heads': (q, k[:, :, :2], v[:, :, :2], bias, {}),
  'one key head': (q, k[:, :, :1], v[:, :, :1], None, dict(mask=segments)),
  'dense, sinks': (q, k, v, None, dict(
    mask=np.arange(B * K).reshape(B, 1, 1, K) % 3 > 0, sinks=jnp.arange(4.))),
  'alibi': (q, k, v, None, dict(alibi=attention.alibi(H), is_causal=True)),
  'mapped': (q, k, v, None, dict(is_mapped=True)),
}

def gradients(q, k, v, bias, ct, *, alibi=None, is_mapped=False, **arguments):
  def attend(q, k, v, bias):
    call = lambda *x: attention.dot_product_attention(
      *x, bias=alibi if bias is None else bias, **arguments)
    return (jax.vmap(call) if is_mapped else call)(q, k, v)
  output, vjp = jax.vjp(attend, q, k, v, bias)
  return output, vjp(ct)

results = {}
for name, (q, k, v, bias, arguments) in cases.items():
  run = jax.jit(lambda *x: gradients(*x, **arguments))
  one = run(q, k, v, bias, ct)
  rows = NamedSharding(mesh, PartitionSpec('batch', None, 'heads'))
  some = NamedSharding(mesh, PartitionSpec('batch'))
  put = [jax.device_put(x, rows if x.shape[2] == H else some)
         for x in (q, k, v)]
  program = run.lower(*put, bias, jax.device_put(ct, rows)).compile()
  four = program(*put, bias, jax.device_put(ct, rows))
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True)
  results[name] = {
    'error': max(float(jnp.abs(x - y).max()) for x, y in pairs),
    'text': program.as_text(),
  }

x = jax.device_put(draw(4, 64, H, D), rows)
attend = jax.jit(lambda x: attention.dot_product_attention(x, x, x))
lowered = attend.trace(x).lower(lowering_platforms=('tpu',)).as_text()
results['tpu'] = {'error': 0, 'text': lowered}

def in_rows(x):
  def rows(scale, x):
    heads = scale * x.reshape(*x.shape[:2], 2, 4)
    return attention.dot_product_attention(heads, heads, heads)
  return jax.grad(lambda x: map_rows(rows, jnp.ones(()), x).sum())(x)

x = 0.1 * draw(40, 100, 8)
one, four = jax.jit(in_rows)(x), jax.jit(in_rows)(jax.device_put(x, rows))
error = float(jnp.abs(one - four).max())
results['in rows'] = {'error': error, 'text': ''}

q = jnp.zeros((B, 30, H, D))
eye = jnp.broadcast_to(jnp.eye(30)[:, None], (B, 30, H, 30))
drop = jax.jit(lambda *x: attention.dot_product_attention(
  *x, dropout_rate=0.3, dropout_rng=jax.random.key(0)))
kept = np.asarray(drop(*(jax.device_put(x, rows) for x in (q, q, eye)))) > 0
results['dropout'] = {
  'share': float(kept.mean()),
  'alike': float((kept[:3] == kept[3:]).mean()),
}
print(json.dumps(results))
"""


@pytest.fixture(scope='module')
def results():
  command = [sys.executable, '-c', _COMPARE]
  root = pathlib.Path(__file__).parents[3]
  done = subprocess.run(command, capture_output=True, text=True, cwd=root)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_each_device_computes_its_own_rows_and_heads(results):
  for name, found in results.items():
    if name == 'dropout':
      continue
    assert found['error'] < 2e-6, name
    if name != 'mapped':
      for collective in ('all-to-all', 'collective-permute'):
        assert collective not in found['text'], name


def test_operands_are_not_gathered(results):
  for name in ('bias', 'bias of rows', 'dense, sinks', 'alibi'):
    assert 'all-gather' not in results[name]['text'], name
  assert 'all-reduce' in results['bias']['text']
  assert 'all-reduce' not in results['alibi']['text']


def test_devices_have_different_dropout_patterns(results):
  assert abs(results['dropout']['share'] - 0.7) < 0.02
  # Two independent draws with probability 0.7 agree in 0.58 of all places.
  assert abs(results['dropout']['alike'] - 0.58) < 0.03


def test_tpu_programs_do_not_partition_kernels(results):
  # The TPU compiler has no hook to partition a kernel.
  assert 'dot_general' in results['tpu']['text']
  for call in ('tpu_custom_call', 'CustomSPMDPartitioning'):
    assert call not in results['tpu']['text']
