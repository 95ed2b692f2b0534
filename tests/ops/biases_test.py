import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.ops import biases


def test_alibi_slopes_match_paper():
  np.testing.assert_allclose(
    biases.alibi(8).slopes, [2.0**-i for i in range(1, 9)]
  )
  # 12 heads: the slopes of 8, then every other slope of 16.
  expected = [2.0**-i for i in range(1, 9)]
  expected += [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
  np.testing.assert_allclose(biases.alibi(12).slopes, expected, rtol=1e-6)


def test_alibi_decreases_with_distance():
  bias = biases.alibi(2).to_array(3, 4)
  np.testing.assert_allclose(
    bias[0], -(2.0**-4) * np.abs(np.arange(4) - np.arange(3)[:, None])
  )


def test_near_buckets_are_exact_and_far_ones_shared():
  bias = biases.relative_buckets(jnp.zeros((32, 1)), 32, 128, True)
  near = bias.buckets(jnp.arange(-7, 8))
  np.testing.assert_array_equal(near, [*range(7, 0, -1), 0, *range(17, 24)])
  far = bias.buckets(jnp.array([-8, -127, -128, -5000, 128, 5000]))
  np.testing.assert_array_equal(far, [8, 15, 15, 15, 31, 31])


def test_unidirectional_buckets_ignore_future_keys():
  bias = biases.relative_buckets(jnp.zeros((8, 1)), 8, 20, False)
  assert not np.asarray(bias.buckets(jnp.arange(0, 50))).any()
  past = np.asarray(bias.buckets(-jnp.arange(0, 50)))
  assert (np.diff(past) >= 0).all()
  assert past[-1] == 7


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: biases.alibi(0), 'num_heads: expected 1 or more, got 0'),
    (
      lambda: biases.relative_buckets(jnp.zeros((3, 2)), 4),
      r'table: expected \[num_buckets=4, h\], got \(3, 2\)',
    ),
    (
      lambda: biases.relative_buckets(jnp.zeros((2, 2)), 2),
      'num_buckets: expected 4 or more, got 2',
    ),
    (
      lambda: biases.relative_buckets(jnp.zeros((8, 2), int), 8),
      'table: expected float32, .* got int32',
    ),
    (
      lambda: biases.relative_buckets(jnp.zeros((8, 2)), 8, 2),
      'max_distance: expected more than the 2 near buckets, got 2',
    ),
    (
      lambda: attention.dot_product_attention(
        *[jnp.zeros((5, 3, 4))] * 3, bias=biases.alibi(2)
      ),
      'bias: expected a bias for 3 heads, got 2 heads',
    ),
  ],
)
def test_invalid_biases_raise(make, message):
  with pytest.raises(ValueError, match=message):
    make()
