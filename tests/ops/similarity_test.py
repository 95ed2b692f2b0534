"""Similarities of queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask
from attention.ops import similarity
from attention.ops.arguments import check
from attention.ops.implementations import reference
from attention.ops.implementations.chunked.query_loop import QueryLoop

B, Q, K, H, G, D, E = 3, 5, 7, 6, 2, 11, 13
IMPLEMENTATIONS = ('reference', 'chunked')


@pytest.fixture
def qkvv(arrays):
  return arrays((B, Q, H, D), (B, K, G, D), (B, K, G, E), (H, D))


def _additive(query, key, value, vector, bias=0.0, mask=True):
  """Compute the formula in float64 NumPy, one logit at a time."""
  query, key, value, vector = (
    np.asarray(x, np.float64) for x in (query, key, value, vector)
  )
  logits = np.empty((B, H, Q, K))
  for b, h, q, k in np.ndindex(B, H, Q, K):
    g = h * G // H
    logits[b, h, q, k] = vector[h] @ np.tanh(query[b, q, h] + key[b, k, g])
  exp = np.exp(logits + bias) * mask
  weights = exp / exp.sum(-1, keepdims=True)
  value = np.repeat(value, H // G, axis=2)
  return np.einsum('bhqk,bkhe->bqhe', weights, value)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_additive_matches_formula(qkvv, arrays, assert_close, implementation):
  (bias,) = arrays((H, Q, K), seed=1)
  causal = np.arange(K) <= np.arange(Q)[:, None]
  actual = attention.additive_attention(
    *qkvv, bias=bias, is_causal=True, implementation=implementation
  )
  bias = np.asarray(bias, np.float64)
  assert_close(actual, _additive(*qkvv, bias=bias, mask=causal))


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize(
  'bias', [(H, Q, K), (B, 1, 1, K), (1, H, Q, 1), 'alibi', None]
)
def test_additive_query_loop_matches_reference_gradients(
  qkvv, arrays, assert_close, count, bias
):
  if bias == 'alibi':
    bias = attention.alibi(H)
  elif bias is not None:
    (bias,) = arrays(bias, seed=1)
  (sinks, weights) = arrays((H,), (B, Q, H, E), seed=2)
  mask = Mask.causal(-1) & Mask.lengths(key_lengths=np.array([0, 3, K]))
  rng = jax.random.key(0)

  def loss(qkvv, bias, sinks, attend):
    *qkv, vector = qkvv
    *qkv, options = check(
      *qkv,
      vector=vector,
      bias=bias,
      sinks=sinks,
      mask=mask,
      dropout_rate=0.3,
      dropout_rng=rng,
    )
    return (attend(*qkv, options) * weights).sum()

  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=3)
  expected = run(qkvv, bias, sinks, reference.attention)
  actual = run(qkvv, bias, sinks, QueryLoop(count=count))
  jax.tree.map(assert_close, actual, expected)


def test_chunked_additive_never_holds_all_tanhs(arrays):
  n, d = 512, 64
  x = jax.ShapeDtypeStruct((1, n, 2, d), jnp.float32)
  vector = jax.ShapeDtypeStruct((2, d), jnp.float32)

  def memory(implementation):
    def loss(*args):
      return attention.additive_attention(
        *args, implementation=implementation
      ).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    compiled = grad.lower(x, x, x, vector).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory('chunked') < memory('reference') / 10


def test_additive_accumulates_gradients_in_float32(arrays):
  # There are 1,024 blocks; a bfloat16 sum would lose most of them.
  query, key, value = arrays(*[(1, 1024, 1, 2)] * 3, dtype=jnp.bfloat16)
  (vector,) = arrays((1, 2), dtype=jnp.bfloat16)

  def loss(value):
    *inputs, options = check(query, key, value, vector=vector)
    return QueryLoop(count=1)(*inputs, options).astype(jnp.float32).sum()

  gradient = jax.jit(jax.grad(loss))(value).astype(jnp.float32)
  # Each query's weights sum to 1.
  np.testing.assert_allclose(gradient.sum((0, 1, 2)), 1024, rtol=1e-2)


def test_additive_weights_match_outputs(qkvv, assert_close):
  query, key, value, vector = qkvv
  weights = attention.attention_weights(
    query, key, vector=vector, heads=[4, 1], queries=[2, 0]
  )
  actual = np.einsum('bhqk,bkhe->bqhe', weights, value[:, :, [1, 0]])
  expected = attention.additive_attention(*qkvv)[:, [2, 0]][:, :, [4, 1]]
  assert_close(actual.astype(np.float32), expected)


def test_additive_without_tanh_ignores_the_query(qkvv):
  query, key, _, vector = qkvv
  # In vector · (query + key), the query adds the same to every key's logit.
  logits = jnp.einsum('hd,bkhd->bhk', vector, jnp.repeat(key, H // G, 2))
  of_query = jnp.einsum('hd,bqhd->bhq', vector, query)
  weights = jax.nn.softmax(of_query[..., None] + logits[:, :, None])
  np.testing.assert_allclose(
    weights, np.broadcast_to(weights[:, :, :1], weights.shape), atol=1e-6
  )


def test_invalid_vector_raises(qkvv):
  query, key, value, vector = qkvv
  with pytest.raises(ValueError, match=r'vector: expected shape \[h, d\]'):
    attention.additive_attention(query, key, value, vector[:2])
  with pytest.raises(ValueError, match='vector: expected float32'):
    attention.additive_attention(query, key, value, vector.astype(int))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_cosine_ignores_lengths(arrays, assert_close, dtype):
  query, key = arrays((2, 3, 5, 7), (2, 4, 5, 7), dtype=dtype)
  q, k, scale = similarity.cosine(query * 8, key / 4)
  assert q.dtype == dtype and scale == 1.0
  products = jnp.einsum('bqhd,bkhd->bhqk', q, k)
  q, k = (np.asarray(x, np.float64) for x in (query, key))
  lengths = [np.linalg.norm(x, axis=-1).swapaxes(1, 2) for x in (q, k)]
  expected = np.einsum('bqhd,bkhd->bhqk', q, k)
  expected /= lengths[0][..., None] * lengths[1][:, :, None]
  assert_close(products, expected)


def test_cosine_of_zero_has_finite_gradients():
  def total(x):
    return similarity.cosine(x, x)[0].sum()

  assert np.isfinite(jax.grad(total)(jnp.zeros((1, 2, 1, 3)))).all()


def test_general_supports_different_widths(arrays, assert_close):
  query, key, weight = arrays((2, 3, 6, 5), (2, 4, 3, 7), (6, 5, 7))
  q, k, scale = similarity.general(query, key, weight)
  logits = jnp.einsum('bqhd,bkhd->bhqk', q, jnp.repeat(k, 2, 2)) * scale
  expected = np.einsum(
    'bqhc,hcd,bkhd->bhqk', query, weight, np.repeat(key, 2, 2)
  )
  assert_close(logits, expected)
  with pytest.raises(ValueError, match='weight: expected shape'):
    similarity.general(query, key, weight[:3])


def test_scales_match_papers():
  x = jnp.ones((2, 3, 16))
  assert similarity.scaled_dot(x, x)[2] == 0.25
  assert similarity.dot(x, x)[2] == 1.0
