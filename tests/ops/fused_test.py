"""Kernels of `fused`, interpreted on a CPU, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mask
from attention.ops import biases, reference
from attention.ops.checks import check
from attention.ops.fused import Tpu, Triton

B, Q, K, H, G, D, E = (2, 3), 37, 70, 4, 2, 8, 20
_RNG = np.random.default_rng(0)
_LENGTHS = np.array([[0, 4, 70], [33, 17, 3]])
_TABLE = _RNG.normal(size=(8, H)).astype('f')
CASES = {
  'plain': dict(),
  'causal': dict(is_causal=True),
  'window': dict(mask=Mask.window(3, 1)),
  'offsets': dict(mask=Mask.causal(_LENGTHS - 8)),
  'lengths': dict(mask=Mask.lengths(_LENGTHS[::-1], _LENGTHS)),
  'segments': dict(
    mask=Mask.segments(
      np.sort(_RNG.integers(0, 4, (*B, Q))),
      np.sort(_RNG.integers(0, 4, (*B, K))),
    )
  ),
  'prefix': dict(mask=Mask.prefix(_LENGTHS)),
  'dense': dict(mask=_RNG.random((2, 1, H, Q, K)) < 0.3),
  'square': dict(mask=_RNG.random((Q, K)) < 0.3, is_causal=True),
  'keys': dict(mask=_RNG.random((*B, 1, 1, K)) < 0.3),
  'bias': dict(bias=(H, Q, K)),
  'bias_causal': dict(bias=(H, Q, K), is_causal=True),
  'bias_full': dict(bias=(*B, H, Q, K)),
  'bias_some_rows': dict(bias=(2, 1, H, Q, K)),
  'bias_other_rows': dict(bias=(1, 3, 1, 1, K)),
  'bias_queries': dict(bias=(1, 1, H, Q, 1)),
  'bias_number': dict(bias=(1, 1, 1, 1, 1)),
  'alibi': dict(bias=biases.alibi(H), is_causal=True),
  'alibi_of_one_head': dict(bias=biases.alibi(1)),
  'buckets': dict(bias=biases.relative_buckets(_TABLE, 8, 20)),
  'sinks': dict(sinks=(H,), is_causal=True),
  'cap': dict(logit_cap=0.7, bias=(H, Q, K)),
  'dropout': dict(
    dropout_rate=0.3, dropout_rng=jax.random.key(1), bias=(H, Q, K)
  ),
}


def _arguments(case, dtype='float32', d=D, e=E):
  keys = iter(jax.random.split(jax.random.key(0), 9))

  def normal(*shape):
    return jax.random.normal(next(keys), shape).astype(dtype)

  arguments = {
    name: normal(*x) if name in ('bias', 'sinks') and type(x) is tuple else x
    for name, x in CASES[case].items()
  }
  qkv = normal(*B, Q, H, d), normal(*B, K, G, d), normal(*B, K, G, e)
  return check(*qkv, **arguments), normal(*B, Q, H, e)


def _gradients(attend, checked, cotangent):
  query, key, value, call = checked
  floats = (query, key, value, call.bias, call.sinks)

  def function(query, key, value, bias, sinks):
    new = type(call)(**{**vars(call), 'bias': bias, 'sinks': sinks})
    return attend(query, key, value, new)

  output, vjp = jax.vjp(function, *floats)
  return jax.tree.leaves((output, vjp(cotangent)))


@pytest.mark.parametrize('kind', [Triton, Tpu])
@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients_are_the_references(case, kind):
  checked, cotangent = _arguments(case)
  kernels = jax.jit(lambda *a: _gradients(kind(interpret=True), *a))
  got = kernels(checked, cotangent)
  expected = _gradients(reference.attention, checked, cotangent)
  assert len(got) == len(expected)
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
  ('dtype', 'sizes'),
  [('float32', (24, 256)), ('bfloat16', (256, 16)), ('float16', (8, 8))],
)
def test_head_sizes_and_dtypes(dtype, sizes):
  checked, cotangent = _arguments('bias_causal', dtype, *sizes)
  got = _gradients(Triton(interpret=True), checked, cotangent)
  expected = _gradients(reference.attention, checked, cotangent)
  tolerance = 2e-4 if dtype == 'float32' else 4e-2
  for x, y in zip(got, expected, strict=True):
    assert x.dtype == y.dtype
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    scale = float(jnp.abs(y).max())
    np.testing.assert_allclose(x / scale, y / scale, atol=tolerance)
