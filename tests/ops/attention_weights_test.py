import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask

B, Q, K, H, G, D = 3, 5, 7, 6, 2, 11


@pytest.fixture
def call(arrays):
  query, key, bias, sinks = arrays(
    (B, Q, H, D), (B, K, G, D), (B, H, Q, K), (H,)
  )
  lengths = np.array([0, 3, K])
  mask = Mask.lengths(key_lengths=lengths) & Mask.causal(1)
  return query, key, dict(bias=bias, mask=mask, sinks=sinks, logit_cap=2.0)


def test_weights_times_values_are_the_output(call, arrays, assert_close):
  query, key, arguments = call
  (value,) = arrays((B, K, G, D), seed=1)
  weights = attention.attention_weights(query, key, **arguments)
  assert weights.dtype == jnp.float32
  heads = jnp.repeat(value, H // G, axis=2)
  expected = attention.dot_product_attention(query, key, value, **arguments)
  assert_close(jnp.einsum('bhqk,bkhd->bqhd', weights, heads), expected)


def test_rows_sum_to_one_or_to_zero_where_nothing_is_seen(call):
  query, key, arguments = call
  del arguments['sinks']
  sums = attention.attention_weights(query, key, **arguments).sum(-1)
  assert not np.asarray(sums[0]).any()
  np.testing.assert_allclose(sums[1:], 1, rtol=1e-6)


def test_chosen_heads_and_queries_are_those_of_the_whole(call, assert_close):
  query, key, arguments = call
  whole = attention.attention_weights(query, key, **arguments)
  some = attention.attention_weights(
    query, key, heads=[4, 1], queries=[3, -1, 0], **arguments
  )
  assert_close(some, whole[:, [4, 1]][:, :, [3, -1, 0]])


@pytest.mark.parametrize('bias', [attention.alibi(H), None])
def test_descriptions_serve_too(call, bias, assert_close):
  query, key, _ = call
  array = None if bias is None else bias.to_array(Q, K)
  assert_close(
    attention.attention_weights(query, key, bias=bias, queries=[2]),
    attention.attention_weights(query, key, bias=array)[:, :, 2:3],
  )


def test_the_whole_pattern_is_never_built():
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
def test_what_is_not_there_is_refused(call, chosen, message):
  query, key, _ = call
  with pytest.raises(ValueError, match=message):
    attention.attention_weights(query, key, **chosen)
