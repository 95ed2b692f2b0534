"""Compare the `fused` kernels to the reference; interpreted where need be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask
from attention.ops import biases, cpu_kernels
from attention.ops.arguments import check
from attention.ops.implementations import reference
from attention.ops.implementations.dispatch import dispatch
from attention.ops.implementations.fused import Cpu, Tpu, Triton, operands
from attention.ops.implementations.fused.gpu_launch import Launch
from attention.ops.implementations.fused.tile import dot
from attention.ops.platforms import default_platform

pytestmark = pytest.mark.usefixtures('exact_products')
B, H, G, D, E = (2, 3), 4, 2, 8, 20
# Queries and keys fill several blocks, the last one partly.
KINDS = {
  'cpu': (Cpu(), 150, 290),
  'cuda': (Triton(), 37, 70),
  'tpu': (Tpu(most=128), 150, 290),
}
_TABLE = np.random.default_rng(0).normal(size=(8, H)).astype('f')


def _cases(q, k):
  """Arguments by case name; biases and sinks are given as shapes."""
  rng = np.random.default_rng(0)
  lengths = np.array([[0, 4, k], [k // 2, 17, 3]])
  segments = [np.sort(rng.integers(0, 4, (*B, n))) for n in (q, k)]
  return {
    'plain': dict(),
    'causal': dict(is_causal=True),
    'window': dict(mask=Mask.window(3, 1)),
    'offsets': dict(mask=Mask.causal(lengths - 8)),
    'lengths': dict(mask=Mask.lengths(lengths[::-1], lengths)),
    'numbers': dict(mask=Mask.lengths(q - 3, k - 5) & Mask.prefix(k // 3)),
    'key_lengths': dict(mask=Mask.lengths(key_lengths=lengths)),
    'segments': dict(mask=Mask.segments(*segments)),
    'prefix': dict(mask=Mask.prefix(lengths)),
    'dense': dict(mask=rng.random((2, 1, H, q, k)) < 0.3),
    'square': dict(mask=rng.random((q, k)) < 0.3, is_causal=True),
    'keys': dict(mask=rng.random((*B, 1, 1, k)) < 0.3),
    'bias': dict(bias=(H, q, k)),
    'bias_causal': dict(bias=(H, q, k), is_causal=True),
    'bias_full': dict(bias=(*B, H, q, k)),
    'bias_some_rows': dict(bias=(2, 1, H, q, k)),
    'bias_other_rows': dict(bias=(1, 3, 1, 1, k)),
    # Without sinks, a bias that is constant over keys has a zero gradient.
    'bias_queries': dict(bias=(1, 1, H, q, 1), sinks=(H,)),
    'bias_number': dict(bias=(1, 1, 1, 1, 1), sinks=(H,)),
    'alibi': dict(bias=biases.alibi(H), is_causal=True),
    'alibi_of_one_head': dict(bias=biases.alibi(1)),
    'buckets': dict(bias=biases.relative_buckets(_TABLE, 8, 20)),
    'sinks': dict(sinks=(H,), is_causal=True),
    'cap': dict(logit_cap=0.7, bias=(H, q, k)),
    'dropout': dict(
      dropout_rate=0.3, dropout_rng=jax.random.key(1), bias=(H, q, k)
    ),
  }


CASES = tuple(_cases(2, 2))
# Every mask and every bias, paired to compile fewer programs.
PAIRS = (
  'plain',
  'window+bias_full',
  'offsets+bias_some_rows',
  'lengths+bias_other_rows',
  'numbers+cap',
  'key_lengths+alibi_of_one_head',
  'segments+buckets',
  'prefix+bias_queries',
  'dense+bias',
  'square+dropout',
  'keys+bias_number',
  'alibi',
  'bias_causal',
  'sinks',
)
_ALONE = [
  pytest.param(c, marks=pytest.mark.slow) for c in CASES if c not in PAIRS
]


def _arguments(case, q, k, dtype='float32', d=D, e=E, batch=B):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  cases = _cases(q, k)
  arguments = {
    name: normal(*x) if name in ('bias', 'sinks') and type(x) is tuple else x
    for part in case.split('+')
    for name, x in cases[part].items()
  }
  qkv = (
    normal(*batch, q, H, d),
    normal(*batch, k, G, d),
    normal(*batch, k, G, e),
  )
  return check(*qkv, **arguments), normal(*batch, q, H, e)


def _kernels(kind):
  """The kernels of a platform, and the numbers of queries and keys."""
  kernels, q, k = KINDS[kind]
  platform = default_platform()
  if platform not in ('cpu', kind):
    pytest.skip(f'{kind!r} kernels do not run on {platform!r}')
  if kind == 'cpu':
    if reason := cpu_kernels.reason():
      pytest.skip(reason)
    return kernels, q, k
  return dataclasses.replace(kernels, interpret=platform == 'cpu'), q, k


def _gradients(attend, checked, cotangent):
  query, key, value, options = checked
  floats = (query, key, value, options.bias, options.sinks)

  def function(query, key, value, bias, sinks):
    new = type(options)(**{**vars(options), 'bias': bias, 'sinks': sinks})
    return attend(query, key, value, new)

  output, vjp = jax.vjp(function, *floats)
  return jax.tree.leaves((output, vjp(cotangent)))


def _run(attend, *arguments):
  return jax.jit(lambda *a: _gradients(attend, *a))(*arguments)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('case', [*PAIRS, *_ALONE])
def test_outputs_and_gradients_match_the_reference(case, kind, assert_close):
  kernels, q, k = _kernels(kind)
  arguments = _arguments(case, q, k)
  got = _run(kernels, *arguments)
  expected = _run(reference.attention, *arguments)
  assert len(got) == len(expected)
  # A gradient accumulated over all keys is small next to its terms.
  scales = {'bias_queries': 10, 'bias_number': 100}
  scale = max(scales.get(part, 1) for part in case.split('+'))
  for x, y in zip(got, expected, strict=True):
    assert_close(x, y, scale=scale)


def test_logits_scaled_by_zero_have_finite_gradients(assert_close):
  kernels, q, k = _kernels('cpu')
  query, key, value = (jnp.ones((1, n, 2, 4)) for n in (q, k, k))
  arguments = check(query, key, value, scale=0.0), jnp.ones((1, q, 2, 4))
  expected = _run(reference.attention, *arguments)
  for x, y in zip(_run(kernels, *arguments), expected, strict=True):
    assert_close(x, y)


@pytest.mark.parametrize(
  ('kernel', 'size', 'bias', 'stages'),
  [
    # KiB: what is kept, and per stage: blocks of keys and values, and a tile.
    ('forward', 32, 'float32', 4),  # 8 + 4 · (4 + 16)
    ('forward', 64, 'bfloat16', 3),  # 8 + 3 · (16 + 8)
    ('forward', 64, 'float32', 2),  # 8 + 3 · (16 + 16) = 104 > 96
    ('query', 128, 'float32', 1),  # 32 + 2 · (32 + 16) = 128 > 96
    ('bias', 64, 'float32', 2),  # 2 · 32
    ('bias', 128, 'float32', 1),  # 2 · 64 = 128 > 96
  ],
)
def test_stages_fit_into_the_shared_memory_of_small_gpus(
  kernel, size, bias, stages
):
  qkv = [jnp.zeros((1, 128, 2, size), jnp.bfloat16)] * 3
  checked = check(*qkv, bias=jnp.zeros((2, 128, 128), bias))
  launch = Launch.choose(kernel, *operands.prepare(*checked), Triton())
  assert launch.stages == stages


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  ('dtype', 'sizes'),
  [('float32', (24, 256)), ('bfloat16', (256, 16)), ('float16', (8, 8))],
)
def test_head_sizes_and_dtypes(kind, dtype, sizes, assert_close):
  kernels, q, k = _kernels(kind)
  if kind in ('cpu', 'tpu') and dtype == 'float16':
    pytest.skip(f'{kind!r} kernels have no float16')
  arguments = _arguments('bias_causal', q, k, dtype, *sizes, batch=(1,))
  got = _run(kernels, *arguments)
  expected = _run(reference.attention, *arguments)
  for x, y in zip(got, expected, strict=True):
    assert x.dtype == y.dtype
    assert_close(x, y)


@pytest.mark.parametrize(
  ('changed', 'reason'),
  [
    (dict(dtype='float16'), 'expected float32 or bfloat16, got float16'),
    (dict(q=1), 'at least 64 queries and keys'),
    (dict(mask=Mask.lengths(None, np.ones(70_000, int))), '65536 scalars'),
    (dict(d=264), 'at most 256 channels'),
    (dict(), None),
  ],
)
def test_tpu_kernels_report_unsupported_arguments(changed, reason):
  options = dict(dtype='bfloat16', q=64, d=16, mask=None) | changed
  rows, dtype = 70_000, options['dtype']
  q = jax.ShapeDtypeStruct((rows, options['q'], 1, options['d']), dtype)
  k = jax.ShapeDtypeStruct((rows, 64, 1, options['d']), dtype)
  report = attention.explain(
    q, k, k, mask=options['mask'], platform='tpu', implementation='fused'
  )
  ((_, status),) = report
  assert status == 'chosen' if reason is None else reason in status


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_default_precision_affects_only_float32(dtype):
  x = jnp.ones((8, 8), dtype)
  with jax.default_matmul_precision('highest'):
    products = jax.make_jaxpr(lambda x: dot(x, x, (1, 1)))(x)
  assert ('HIGHEST' in str(products)) == (dtype == 'float32')


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
@pytest.mark.parametrize('case', CASES)
def test_outputs_and_gradients_lower_for_the_device(case, platform, a_gpu):
  checked, cotangent = _arguments(case, 150, 290, 'bfloat16')

  def attend(*checked):
    return dispatch('fused', *checked)

  with a_gpu():
    function = jax.jit(lambda *a: _gradients(attend, *a))
    traced = function.trace(checked, cotangent)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count('attention_key_kernel') > 0
