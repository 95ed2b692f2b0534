"""Products of few rows, on the kernel and elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.ops import cpu_kernels, few_rows, products

A, B = 131, 389  # not multiples of a vector


@pytest.fixture(autouse=True)
def kernels():
  if reason := cpu_kernels.reason():
    pytest.skip(reason)


def _case(rows, dtype='float32', weights='float32', is_transposed=False):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(rows, A)), dtype)
  shape = (B, A) if is_transposed else (A, B)
  weights = jnp.asarray(rng.normal(size=shape), weights)
  exact = np.asarray(weights, np.float64)
  exact = np.asarray(x, np.float64) @ (exact.T if is_transposed else exact)
  return x, weights, exact


@pytest.mark.parametrize('is_transposed', [False, True])
@pytest.mark.parametrize('rows', [1, 2, 5, 16, 32])
@pytest.mark.parametrize(
  'dtypes',
  [('float32', 'float32'), ('float32', 'bfloat16'), ('bfloat16', 'bfloat16')],
)
def test_products_match_the_formula(rows, dtypes, is_transposed, assert_close):
  x, weights, exact = _case(rows, *dtypes, is_transposed)

  @jax.jit
  def dot(x, weights):
    return products.dot(x, weights, is_transposed=is_transposed)

  assert 'attention_product' in dot.lower(x, weights).as_text()
  result = dot(x, weights)
  assert result.dtype == x.dtype
  assert_close(result, exact)


@pytest.mark.parametrize('rows', [0, 33])
def test_no_rows_and_many_rows_are_left_to_xla(rows, assert_close):
  x, weights, exact = _case(rows)
  lowered = jax.jit(products.dot).lower(x, weights)
  assert 'attention_product' not in lowered.as_text()
  assert_close(products.dot(x, weights), exact)


def test_other_platforms_have_no_kernel():
  x, weights, _ = _case(2)
  traced = jax.jit(products.dot).trace(x, weights)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'attention_product' not in text and 'dot_general' in text


def test_derivatives_in_both_modes_are_those_of_the_product(assert_close):
  x, weights, _ = _case(3)

  def plain(x, weights):
    return jnp.sin(x @ weights).sum()

  def ours(x, weights):
    return jnp.sin(products.dot(x, weights)).sum()

  for derivative in (jax.jacfwd, jax.grad):
    got = jax.jit(derivative(ours))(x, weights)
    assert_close(got, derivative(plain)(x, weights))
  hessian = jax.jit(jax.hessian(lambda x: ours(x, weights[:, :129])))
  assert_close(
    hessian(x[:1]), jax.hessian(lambda x: plain(x, weights[:, :129]))(x[:1])
  )


def test_vmap_makes_many_rows_of_few(assert_close):
  x, weights, _ = _case(8)
  stacked = jnp.stack([x] * 9) * jnp.arange(9)[:, None, None]
  mapped = jax.jit(jax.vmap(products.dot, (0, None)))
  assert 'attention_product' not in mapped.lower(stacked, weights).as_text()
  assert_close(mapped(stacked, weights), stacked @ weights)


def test_without_kernels_xla_takes_over(monkeypatch, assert_close):
  monkeypatch.setattr(cpu_kernels, 'reason', lambda: 'not built')
  x, weights, exact = _case(2)
  assert not few_rows.is_supported(x, weights)
  assert_close(products.dot(x, weights), exact)


def test_not_a_number_stays():
  x, weights, _ = _case(2)
  result = products.dot(x.at[1, 3].set(jnp.nan), weights)
  assert not jnp.isnan(result[0]).any()
  assert jnp.isnan(result[1]).all()
