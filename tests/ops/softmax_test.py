import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention


def test_bfloat16_softmax_is_exact_to_the_last_bit(assert_close):
  logits = jax.random.normal(jax.random.key(0), (7, 501)) * 4
  logits = logits.astype(jnp.bfloat16)
  exact = np.exp(np.asarray(logits, np.float64))
  exact /= exact.sum(-1, keepdims=True)
  actual = attention.stable_softmax(logits)
  assert actual.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(actual, float), exact, rtol=2**-8)


def test_softmax_stays_finite_for_huge_logits():
  logits = jnp.array([1e30, -1e30, 1e30], jnp.float32)
  np.testing.assert_array_equal(
    attention.stable_softmax(logits), [0.5, 0.0, 0.5]
  )
  halves = jnp.array([60000.0, -60000.0], jnp.float16)
  np.testing.assert_array_equal(attention.stable_softmax(halves), [1.0, 0.0])


def test_softmax_sums_to_one_along_axis(arrays, assert_close):
  (logits,) = arrays((3, 5, 2))
  weights = attention.stable_softmax(logits, axis=1)
  assert_close(weights.sum(1), jnp.ones((3, 2)))


def test_softmax_of_ints_raises():
  with pytest.raises(ValueError, match=r'logits: expected float32.*got int32'):
    attention.stable_softmax(jnp.arange(3))
