import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask

B, Q, K, H, G, D = 3, 5, 7, 6, 2, 11


@pytest.fixture
def inputs(arrays):
  query, key, bias, sinks = arrays(
    (B, Q, H, D), (B, K, G, D), (B, H, Q, K), (H,)
  )
  lengths = np.array([0, 3, K])
  mask = Mask.lengths(key_lengths=lengths) & Mask.causal(1)
  return query, key, dict(bias=bias, mask=mask, sinks=sinks, logit_cap=2.0)


def test_weights_times_values_match_attention(inputs, arrays, assert_close):
  query, key, arguments = inputs
  (value,) = arrays((B, K, G, D), seed=1)
  weights = attention.attention_weights(query, key, **arguments)
  assert weights.dtype == jnp.float32
  heads = jnp.repeat(value, H // G, axis=2)
  expected = attention.dot_product_attention(query, key, value, **arguments)
  assert_close(jnp.einsum('bhqk,bkhd->bqhd', weights, heads), expected)


def test_rows_sum_to_one_or_to_zero_if_fully_masked(inputs):
  query, key, arguments = inputs
  del arguments['sinks']
  sums = attention.attention_weights(query, key, **arguments).sum(-1)
  assert not np.asarray(sums[0]).any()
  np.testing.assert_allclose(sums[1:], 1, rtol=1e-6)


def test_selected_heads_and_queries_match_all_weights(inputs, assert_close):
  query, key, arguments = inputs
  whole = attention.attention_weights(query, key, **arguments)
  some = attention.attention_weights(
    query, key, heads=[4, 1], queries=[3, -1, 0], **arguments
  )
  assert_close(some, whole[:, [4, 1]][:, :, [3, -1, 0]])


@pytest.mark.parametrize('bias', [attention.alibi(H), None])
def test_bias_objects_match_arrays(inputs, bias, assert_close):
  query, key, _ = inputs
  array = None if bias is None else bias.to_array(Q, K)
  assert_close(
    attention.attention_weights(query, key, bias=bias, queries=[2]),
    attention.attention_weights(query, key, bias=array)[:, :, 2:3],
  )


def test_whole_pattern_is_never_materialised():
  x = jax.ShapeDtypeStruct((1, 20_000, 4, 8), jnp.float32)

  def some(query, key):
    return attention.attention_weights(
      query, key, heads=[0], queries=[5, 19_999], is_causal=True
    )

  compiled = jax.jit(some).lower(x, x).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 20 * 2**20


@pytest.mark.parametrize(
  ('chosen', 'message'),
  [
    (dict(heads=[6]), r'heads: expected 0 to 5, got \[6\]'),
    (dict(queries=[0, 9]), r'queries: expected 0 to 4, got \[9\]'),
    (dict(heads=[0.5]), 'heads: expected ints'),
    (dict(queries=[]), 'queries: expected ints'),
  ],
)
def test_invalid_heads_and_queries_raise(inputs, chosen, message):
  query, key, _ = inputs
  with pytest.raises(ValueError, match=message):
    attention.attention_weights(query, key, **chosen)
