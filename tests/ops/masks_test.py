import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask

Q, K, B = 5, 7, 3
_I, _J = np.arange(Q)[:, None], np.arange(K)


def _expected():
  lengths = np.array([0, 4, 7])
  ids_q = np.arange(B * Q).reshape(B, Q) % 3
  ids_k = np.arange(B * K).reshape(B, K) % 3
  each = lengths[:, None, None, None]
  return {
    'causal': (Mask.causal(), _J <= _I),
    'causal_offset': (Mask.causal(2), _J <= _I + 2),
    'causal_offset_negative': (Mask.causal(-1), _J < _I),
    'causal_offset_each': (Mask.causal(lengths - 3), _I + each - 3 >= _J),
    'window': (Mask.window(1, 2), (_J >= _I - 1) & (_J <= _I + 2)),
    'window_left': (Mask.window(left=1), _J >= _I - 1),
    'window_none': (Mask.window(), np.ones((Q, K), bool)),
    'key_lengths': (Mask.lengths(key_lengths=lengths), (each > _J) & (_I >= 0)),
    'query_lengths': (Mask.lengths(3), (_I < 3) & (_J >= 0)),
    'segments': (
      Mask.segments(ids_q, ids_k),
      (ids_q[:, :, None] == ids_k[:, None, :])[:, None],
    ),
    'prefix': (Mask.prefix(lengths), (_J <= _I) | (each > _J)),
    'dense': (Mask.dense((_I + _J) % 2 == 0), (_I + _J) % 2 == 0),
    'joined': (
      Mask.causal() & Mask.lengths(key_lengths=lengths),
      (_J <= _I) & (each > _J),
    ),
  }


CASES = _expected()


def _full(array):
  array = np.asarray(array)
  shape = np.broadcast_shapes(array.shape, (Q, K))
  return np.broadcast_to(array, shape)


@pytest.mark.parametrize('name', CASES)
def test_to_array_matches_definition(name):
  mask, expected = CASES[name]
  np.testing.assert_array_equal(_full(mask.to_array(Q, K)), _full(expected))


@pytest.mark.parametrize('name', CASES)
def test_tile_matches_part_of_array(name):
  mask, expected = CASES[name]
  tile = jax.jit(lambda m, q, k: m.tile(q, 3, k, 2))(mask, 1, 4)
  shape = np.broadcast_shapes(np.shape(tile), (3, 2))
  np.testing.assert_array_equal(
    np.broadcast_to(tile, shape), _full(expected)[..., 1:4, 4:6]
  )


@pytest.mark.parametrize('name', CASES)
def test_static_diagonals_bound_allowed_keys(name):
  mask, expected = CASES[name]
  low, high = mask.diagonals()
  distance = np.broadcast_to(_J - _I, _full(expected).shape)
  allowed = distance[_full(expected)]
  assert low is None or (allowed >= low).all()
  assert high is None or (allowed <= high).all()


def test_python_ints_give_static_diagonals():
  assert (Mask.causal(2) & Mask.window(4, 1)).diagonals() == (-4, 1)
  assert Mask.causal(np.array([2])).diagonals() == (None, None)


@pytest.mark.parametrize('far', [2**31 - 1, np.array([2**31 - 1, 3])])
@pytest.mark.parametrize('implementation', ['reference', 'chunked', None])
def test_bounds_beyond_all_positions_are_no_bounds(far, implementation):
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, 2, 24, 1, 8)).astype('f')
  for mask in (Mask.causal(far), Mask.window(right=far)):
    y = attention.dot_product_attention(
      q, k, v, mask=mask, implementation=implementation
    )
    expected = attention.dot_product_attention(
      q, k, v, mask=mask.to_array(24, 24), implementation='reference'
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert np.broadcast_to(mask.to_array(24, 24), (2, 1, 24, 24))[0].all()


def test_a_mask_joins_a_boolean_array():
  array = np.arange(35).reshape(5, 7) % 3 > 0
  joined = Mask.causal() & array
  np.testing.assert_array_equal(
    joined.to_array(5, 7), Mask.causal().to_array(5, 7) & array
  )
  with pytest.raises(ValueError, match='mask: expected a boolean array'):
    Mask.causal() & np.ones((5, 7))


def test_unsigned_bounds_match_ints():
  left, right = np.array([2], np.uint8), np.array([0], np.uint8)
  np.testing.assert_array_equal(
    Mask.window(left, right).to_array(Q, K)[0, 0],
    _full(Mask.window(2, 0).to_array(Q, K)),
  )


def test_masks_of_equal_structure_do_not_recompile():
  traces = []

  @jax.jit
  def count(mask):
    traces.append(mask)
    return mask.to_array(Q, K).sum()

  lengths = np.array([1, 2, 3])
  count(Mask.causal() & Mask.lengths(key_lengths=lengths))
  count(Mask.causal() & Mask.lengths(key_lengths=lengths + 1))
  assert len(traces) == 1
  count(Mask.causal(1) & Mask.lengths(key_lengths=lengths))
  assert len(traces) == 2


def test_masks_support_vmap():
  lengths = jnp.arange(B)
  rows = jax.vmap(lambda n: Mask.lengths(key_lengths=n).to_array(Q, K).sum(-1))(
    lengths
  )
  np.testing.assert_array_equal(
    np.unique(rows, axis=-1).squeeze(), np.arange(B)
  )


def test_invalid_arguments_raise():
  with pytest.raises(ValueError, match='expected a boolean array.*float32'):
    Mask.dense(jnp.ones((2, 2)))
  with pytest.raises(
    ValueError, match="a Mask or a boolean array, got 'causal'"
  ):
    Mask.dense('causal')
  with pytest.raises(ValueError, match='a boolean array, got <bound'):
    Mask.dense(Mask.causal)
  with pytest.raises(ValueError, match='key_lengths: expected an int or'):
    Mask.lengths(key_lengths=np.array([1.5]))
  with pytest.raises(ValueError, match='query_ids'):
    Mask.segments(3)
  with pytest.raises(ValueError, match='query_ids: expected integers'):
    Mask.segments(np.array([1.2, 1.7]))
