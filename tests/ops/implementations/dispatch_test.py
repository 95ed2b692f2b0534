"""The choice of an implementation, by platform and by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask
from attention.ops import cpu_kernels

B, Q, K, H, G, D, E = 3, 5, 7, 6, 2, 11, 13


@pytest.fixture
def qkv(arrays):
  return arrays((B, Q, H, D), (B, K, G, D), (B, K, G, E))


def test_explain_follows_platform():
  x = jax.ShapeDtypeStruct((B, 64, H, D), jnp.float32)

  def explain(platform):
    reasons = attention.explain(x, x, x, is_causal=True, platform=platform)
    return dict(reasons)

  reasons = explain('rocm')
  assert reasons['fused'] == "no kernel for platform 'rocm'"
  assert reasons['chunked'] == 'chosen'
  reasons = explain('cpu')
  assert reasons['fused'] == cpu_kernels.reason() or 'chosen'
  assert explain('gpu') == explain('cuda')
  for platform in ('cuda', 'tpu'):
    assert explain(platform)['fused'] == 'chosen'
  with pytest.raises(ValueError, match="platform: expected one of .*'vulkan'"):
    explain('vulkan')


def test_dispatch_follows_lowering_platform(qkv, a_gpu):
  x = jax.ShapeDtypeStruct((B, 64, H, D), jnp.float32)

  def text(platform):
    function = jax.jit(lambda *a: attention.dot_product_attention(*a))
    lowered = function.trace(x, x, x).lower(lowering_platforms=(platform,))
    return lowered.as_text()

  with a_gpu():
    assert 'attention_forward_kernel' in text('cuda')
  assert 'tpu_custom_call' in text('tpu')
  is_built = cpu_kernels.reason() is None
  assert ('attention_forward' in text('cpu')) == is_built
  with pytest.raises(NotImplementedError, match='fused: .*64 queries'):
    function = jax.jit(
      lambda *a: attention.dot_product_attention(*a, implementation='fused')
    )
    function.trace(*qkv).lower(lowering_platforms=('tpu',))


def test_gradients_with_key_lengths_lower_for_gpu(qkv, a_gpu):
  def total(qkv, lengths):
    mask = Mask.lengths(key_lengths=lengths)
    return attention.dot_product_attention(*qkv, mask=mask).sum()

  with a_gpu():
    traced = jax.jit(jax.grad(total)).trace(qkv, np.full(B, 3))
    lowered = traced.lower(lowering_platforms=('cuda',))
  assert 'attention_key_kernel' in lowered.as_text()


def test_dispatch_supports_vmap(qkv, assert_close):
  stacked = [jnp.stack([x, 2 * x], 1) for x in qkv]
  mapped = jax.vmap(attention.dot_product_attention, 1, 1)(*stacked)
  for i in (0, 1):
    alone = attention.dot_product_attention(*(x[:, i] for x in stacked))
    assert_close(mapped[:, i], alone)


def test_explain_accepts_shapes():
  x = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
  reported = attention.explain(x, x, x, implementation='reference')
  assert reported == [('reference', 'chosen')]


def test_unsupported_platform_raises(qkv):
  qkv = jax.device_put(qkv, jax.devices('cpu')[0])
  with pytest.raises(NotImplementedError, match="cudnn: .*platform 'cpu'"):
    attention.dot_product_attention(*qkv, implementation='cudnn')


def test_without_cpu_kernels_the_loops_take_over(qkv, monkeypatch):
  monkeypatch.setattr(cpu_kernels, 'reason', lambda: 'not built')
  reported = attention.explain(*qkv, platform='cpu')
  assert reported[:2] == [('fused', 'not built'), ('chunked', 'chosen')]


def test_sequence_of_implementations_falls_back(qkv, assert_close):
  output = attention.dot_product_attention(
    *qkv, implementation=('fused', 'reference')
  )
  expected = attention.dot_product_attention(*qkv, implementation='reference')
  assert_close(output, expected)
