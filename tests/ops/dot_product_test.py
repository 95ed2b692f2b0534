"""The contract of `dot_product_attention`, tested on every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask
from attention.ops import cpu_kernels
from attention.ops.implementations import dispatch
from attention.ops.implementations.fused import Cpu, Tpu, Triton
from attention.ops.platforms import default_platform

pytestmark = pytest.mark.usefixtures('exact_products')
B, Q, K, H, G, D, E = 3, 5, 7, 6, 2, 11, 13


def _exact(query, key, value, *, bias=0.0, mask=True, scale=None, cap=None):
  """Compute the formula in float64 NumPy."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  heads, groups = query.shape[-2], key.shape[-2]
  key = np.repeat(key, heads // groups, axis=-2)
  value = np.repeat(value, heads // groups, axis=-2)
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  logits = np.einsum('...qhd,...khd->...hqk', query, key) * scale
  if cap is not None:
    logits = cap * np.tanh(logits / cap)
  logits = logits + np.asarray(bias, np.float64)
  mask = np.broadcast_to(mask, logits.shape)
  top = np.max(logits, axis=-1, keepdims=True)
  exp = np.exp(logits - top) * mask
  total = exp.sum(-1, keepdims=True)
  weights = np.divide(exp, total, out=np.zeros_like(exp), where=total > 0)
  return np.einsum('...hqk,...khe->...qhe', weights, value)


@pytest.fixture
def qkv(arrays):
  return arrays((B, Q, H, D), (B, K, G, D), (B, K, G, E))


def _value_and_gradients(function, *inputs):
  """Return the output and the gradients of its sum."""

  @jax.jit
  def run(*inputs):
    output, vjp = jax.vjp(function, *inputs)
    return output, vjp(jnp.ones_like(output))

  return run(*inputs)


class Contract:
  """Tests of all arguments that an implementation does not refuse."""

  implementation: str
  refuses = ()  # arguments that it does not support: tests of them are skipped

  def attend_eagerly(self, *args, **kwargs):
    if refused := {*self.refuses} & {*kwargs}:
      pytest.skip(f'{self.implementation} refuses {sorted(refused)}')
    return attention.dot_product_attention(
      *args, implementation=self.implementation, **kwargs
    )

  def attend(self, *args, **kwargs):
    # One program compiles faster than one per operation.
    attend = functools.partial(self.attend_eagerly, **kwargs)
    return jax.jit(attend)(*args)

  def test_output_matches_formula(self, qkv, assert_close):
    assert_close(self.attend(*qkv), _exact(*qkv))

  @pytest.mark.parametrize('scale', [0.3, 2.0])
  def test_scale_multiplies_the_logits(self, qkv, assert_close, scale):
    assert_close(self.attend(*qkv, scale=scale), _exact(*qkv, scale=scale))

  @pytest.mark.parametrize(
    'shape', [(H, Q, K), (B, H, Q, K), (B, 1, 1, K), (1, H, Q, 1), (1, 1, 1, 1)]
  )
  def test_bias_is_added(self, qkv, arrays, assert_close, shape):
    (bias,) = arrays(shape, seed=1)
    assert_close(self.attend(*qkv, bias=bias), _exact(*qkv, bias=bias))

  def test_is_causal_and_mask_combine_by_and(self, qkv, assert_close):
    mask = np.arange(K) != 2
    actual = self.attend(*qkv, mask=mask[None], is_causal=True)
    causal = np.arange(K) <= np.arange(Q)[:, None]
    assert_close(actual, _exact(*qkv, mask=mask & causal))

  def test_masks_may_have_two_or_four_axes(self, qkv, assert_close):
    mask = np.random.default_rng(0).random((B, 1, Q, K)) < 0.6
    mask[..., 0] = True
    assert_close(self.attend(*qkv, mask=mask), _exact(*qkv, mask=mask))
    assert_close(
      self.attend(*qkv, mask=mask[0, 0]), _exact(*qkv, mask=mask[0, 0])
    )

  def test_logit_cap_precedes_bias(self, qkv, arrays, assert_close):
    (bias,) = arrays((H, Q, K), seed=1)
    actual = self.attend(*qkv, bias=bias, logit_cap=0.7)
    assert_close(actual, _exact(*qkv, bias=bias, cap=0.7))

  def test_sinks_take_weight_but_have_no_value(self, qkv, arrays, assert_close):
    (sinks,) = arrays((H,), seed=1)
    query, key, value = (np.asarray(x) for x in qkv)
    # A sink acts like an additional key with its logit and a value of 0.
    pad = ((0, 0), (0, 1), (0, 0), (0, 0))
    bias = np.zeros((H, Q, K + 1))
    bias[..., -1] = np.asarray(sinks)[:, None]
    expected = _exact(query, np.pad(key, pad), np.pad(value, pad), bias=bias)
    assert_close(self.attend(*qkv, sinks=sinks), expected)

  @pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
  def test_fully_masked_rows_are_zero(self, qkv, dtype):
    qkv = [x.astype(dtype) for x in qkv]
    mask = Mask.lengths(key_lengths=np.array([0, 3, K])) & Mask.causal(-1)

    def attend(*qkv):
      return self.attend_eagerly(*qkv, mask=mask)

    output, (dq, dk, dv) = _value_and_gradients(attend, *qkv)
    assert output.dtype == dtype
    assert not np.asarray(output[0], float).any()
    assert not np.asarray(output[:, 0], float).any()
    assert np.asarray(output[1, 1], float).all()
    for grad in (dq, dk, dv):
      assert np.isfinite(np.asarray(grad, float)).all()
      assert not np.asarray(grad[0], float).any()
    assert not np.asarray(dq[:, 0], float).any()

  @pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
  def test_half_precision_is_accurate(self, qkv, dtype, assert_close):
    qkv = [x.astype(dtype) for x in qkv]
    output = self.attend(*qkv, is_causal=True)
    causal = np.arange(K) <= np.arange(Q)[:, None]
    assert output.dtype == dtype
    assert_close(output, _exact(*qkv, mask=causal))

  @pytest.mark.parametrize('batch', [(), (2,), (2, 1, 3)])
  def test_any_number_of_batch_axes(self, arrays, assert_close, batch):
    qkv = arrays((*batch, Q, H, D), (*batch, K, G, D), (*batch, K, G, E))
    assert_close(self.attend(*qkv), _exact(*qkv))

  def test_vmap_matches_batch(self, qkv, assert_close):
    attend = jax.jit(jax.vmap(self.attend_eagerly))
    assert_close(attend(*qkv), self.attend(*qkv))

  def test_jit_matches_eager(self, qkv, assert_close):
    assert_close(self.attend(*qkv), self.attend_eagerly(*qkv))

  def test_future_keys_have_no_gradient(self, arrays):
    query, key, value = arrays((5, 1, 3), (5, 1, 3), (5, 1, 3))

    def early(key, value):
      return self.attend_eagerly(query, key, value, is_causal=True)[:3].sum()

    for grad in jax.jit(jax.grad(early, (0, 1)))(key, value):
      assert np.asarray(grad[:3]).any()
      assert not np.asarray(grad[3:]).any()

  def test_dropout_preserves_mean_and_is_seeded(self, qkv, assert_close):
    @jax.jit
    def drop(seed):
      return self.attend_eagerly(
        *qkv, dropout_rate=0.4, dropout_rng=jax.random.key(seed)
      )

    assert_close(drop(1), drop(1))
    assert np.abs(drop(1) - drop(2)).max() > 0.1
    mean = np.stack([drop(i) for i in range(300)]).mean(0)
    assert np.abs(mean - self.attend(*qkv)).max() < 0.25

  def test_dropout_zeroes_the_given_share_of_weights(self):
    n = 200
    zeros = np.zeros((n, 1, 4), np.float32)
    eye = np.eye(n, dtype=np.float32)[:, None]
    rng = jax.random.key(0)
    weights = self.attend(zeros, zeros, eye, dropout_rate=0.3, dropout_rng=rng)
    weights = np.asarray(weights)[:, 0]
    kept = weights > 0
    assert abs(kept.mean() - 0.7) < 0.02
    # No whole rows or columns are dropped.
    assert np.abs(kept.mean(0) - 0.7).max() < 0.2
    assert np.abs(kept.mean(1) - 0.7).max() < 0.2
    np.testing.assert_allclose(weights[kept], 1 / n / 0.7, rtol=1e-5)


class TestReference(Contract):
  implementation = 'reference'


class TestChunked(Contract):
  implementation = 'chunked'


class _TpuOfAnySize(Tpu):
  """TPU kernels that accept short sequences too."""

  def refusal(self, *_):
    return None


@pytest.mark.parametrize(
  ('platform', 'kernels'), [('cuda', Triton), ('tpu', _TpuOfAnySize)]
)
class TestFused(Contract):
  """GPU and TPU kernels, interpreted on a CPU."""

  implementation = 'fused'

  @pytest.fixture(autouse=True)
  def kernels_here(self, monkeypatch, platform, kernels):
    here = default_platform()
    if here not in ('cpu', platform):
      pytest.skip(f'kernels for {platform!r} do not run on {here!r}')
    platforms = dispatch._IMPLEMENTATIONS['fused']
    monkeypatch.setitem(platforms, here, kernels(interpret=here == 'cpu'))


class TestCpuKernels(Contract):
  """The C++ kernels, where a compiler has built them."""

  implementation = 'fused'

  @pytest.fixture(autouse=True)
  def kernels_here(self, monkeypatch, request):
    if reason := cpu_kernels.reason():
      pytest.skip(reason)
    case = getattr(request.node, 'callspec', None)
    if case and case.params.get('dtype') == jnp.float16:
      pytest.skip('no float16')
    platforms = dispatch._IMPLEMENTATIONS['fused']
    monkeypatch.setitem(platforms, default_platform(), Cpu())


def test_default_matches_formula(qkv, assert_close):
  assert_close(attention.dot_product_attention(*qkv), _exact(*qkv))


def test_default_supports_sequences_of_many_blocks(arrays, assert_close):
  qkv = arrays(*((1, 700, 3, 4),) * 3)
  causal = np.arange(700) <= np.arange(700)[:, None]
  output = attention.dot_product_attention(*qkv, is_causal=True)
  assert_close(output, _exact(*qkv, mask=causal))


def test_self_attention_matches_formula(arrays, assert_close):
  (x,) = arrays((3, 5, 7))
  exact = np.asarray(x, np.float64)
  logits = exact @ exact.transpose(0, 2, 1)
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  assert_close(attention.self_attention(x), weights @ exact)


def test_self_attention_of_vectors_or_ints_raises():
  with pytest.raises(ValueError, match=r'x: expected \[\*b, t, m\]'):
    attention.self_attention(jnp.ones(3))
  with pytest.raises(ValueError, match='x: expected float32'):
    attention.self_attention(jnp.ones((3, 3), int))
