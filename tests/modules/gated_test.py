"""Tests of gated attention: formula, initial values and errors."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Mask

B, Q, K, A, M, H = 3, 5, 7, 12, 10, 2


def _gated(**fields):
  model = hk.without_apply_rng(
    hk.transform(
      lambda *x, **k: attention.GatedAttention(
        num_head=H, zero_init=False, **fields
      )(*x, **k)
    )
  )
  return model


@pytest.fixture
def inputs(arrays):
  return arrays((B, Q, A), (B, K, M))


def test_gated_attention_matches_its_formula(inputs, arrays, assert_close):
  q_data, m_data = inputs
  model = _gated()
  params = model.init(jax.random.key(0), q_data, m_data)
  (name,) = params
  (bias,) = arrays((H, Q, K))
  mask = np.random.default_rng(0).random((B, 1, 1, K)) < 0.7
  mask[..., 0] = True
  w = {
    k: jax.random.normal(jax.random.key(i), v.shape)
    for i, (k, v) in enumerate(params[name].items())
  }
  query = jnp.einsum('bqa,ahc->bqhc', q_data, w['query_w']) * 6**-0.5
  key = jnp.einsum('bka,ahc->bkhc', m_data, w['key_w'])
  value = jnp.einsum('bka,ahc->bkhc', m_data, w['value_w'])
  logits = jnp.einsum('bqhc,bkhc->bhqk', query, key) + bias
  pattern = jax.nn.softmax(jnp.where(mask, logits, -1e9))
  values = jnp.einsum('bhqk,bkhc->bqhc', pattern, value)
  gate = jnp.einsum('bqa,ahc->bqhc', q_data, w['gating_w']) + w['gating_b']
  values *= 1 / (1 + jnp.exp(-gate))
  expected = jnp.einsum('bqhc,hco->bqo', values, w['output_w']) + w['output_b']
  actual = model.apply({name: w}, q_data, m_data, mask, bias)
  assert_close(actual, expected)


def test_mask_objects_arrays_and_lists_are_equivalent(inputs, assert_close):
  model = _gated()
  params = model.init(jax.random.key(0), *inputs)
  mask = Mask.causal()
  array = jnp.broadcast_to(mask.to_array(Q, K), (B, 1, Q, K))
  assert_close(
    model.apply(params, *inputs, mask), model.apply(params, *inputs, array)
  )
  assert_close(
    model.apply(params, *inputs, array),
    model.apply(params, *inputs, array.tolist()),
  )


def test_initial_parameters(inputs):
  params = _gated().init(jax.random.key(0), *inputs)['gated_attention']
  assert not params['gating_w'].any() and (params['gating_b'] == 1).all()
  assert params['output_w'].any() and not params['output_b'].any()
  limit = np.sqrt(6 / (A * H + A * 6))  # Glorot, with the last two axes as fans
  assert np.abs(params['query_w']).max() <= limit
  zero = hk.transform(
    lambda *x: attention.GatedAttention(num_head=H, name='zero')(*x)
  )
  assert not zero.init(jax.random.key(0), *inputs)['zero']['output_w'].any()


def test_global_attention_ignores_masked_positions(arrays, assert_close):
  x, other = arrays((B, Q, A), (B, Q, A))
  mask = np.ones((B, Q, 1), bool)
  mask[:, 3] = False
  model = hk.without_apply_rng(
    hk.transform(
      lambda x, mask: attention.GlobalAttention(num_head=H, zero_init=False)(
        x, x, mask
      )
    )
  )
  params = model.init(jax.random.key(0), x, mask)
  valid = mask[..., 0]
  expected = model.apply(params, x, mask)[valid]
  assert_close(
    model.apply(params, jnp.where(mask, x, other), mask)[valid], expected
  )


@pytest.mark.parametrize('shape', [(0, Q, A), (B, 0, A)])
def test_empty_axes_give_empty_outputs(shape):
  x = jnp.zeros(shape)
  mask = jnp.ones((shape[0], 1, 1, shape[1]), bool)
  params = _gated().init(jax.random.key(0), *jnp.zeros((2, B, Q, A)))
  assert _gated().apply(params, x, x, mask).shape == shape


@pytest.mark.parametrize('kind', ['GatedAttention', 'GlobalAttention'])
def test_fully_masked_rows_have_finite_gradients(kind, arrays):
  (x,) = arrays((B, Q, A))
  mask = np.zeros((B, Q, 1), bool)
  if kind == 'GatedAttention':
    mask = mask.swapaxes(1, 2)[:, None]
  model = hk.transform(
    lambda x: getattr(attention, kind)(num_head=H, zero_init=False)(x, x, mask)
  )
  params = model.init(jax.random.key(0), x)

  def loss(params, x):
    return (model.apply(params, None, x) ** 2).sum()

  for leaf in jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(params, x)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
  ('fields', 'mask', 'message'),
  [
    ({'num_head': 5}, None, 'num_head: expected a divisor of the width 12'),
    ({'num_head': 4}, None, 'num_head: expected a divisor of the width 10'),
    ({}, np.ones((B, 1, 1, K), 'f'), 'mask: expected booleans'),
    ({}, np.ones((Q, K), bool), 'mask: expected .* of rank 4'),
    ({}, np.ones((B, 1, 1, K + 1), bool), 'mask: expected a shape'),
  ],
)
def test_invalid_inputs_raise(fields, mask, message, inputs):
  fields = {'num_head': H, **fields}
  model = hk.transform(lambda *x: attention.GatedAttention(**fields)(*x, mask))
  with pytest.raises(ValueError, match=message):
    model.init(jax.random.key(0), *inputs)


@pytest.mark.parametrize('kind', ['GatedAttention', 'GlobalAttention'])
def test_mismatched_leading_axes_raise(kind, arrays):
  model = hk.transform(lambda *x: getattr(attention, kind)(num_head=H)(*x))
  inputs = arrays((2, 3, Q, A), (3, 2, Q, A))
  with pytest.raises(ValueError, match=r'm_data: .* \(2, 3\), got \(3, 2\)'):
    model.init(jax.random.key(0), *inputs)
