"""Rows in blocks give what they give all at once, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.ops import mapping

R, T, M, C = 11, 3, 5, 7


def _function(shared, x, mask):
  w, more = shared
  y = jnp.tanh(x @ w + more['b']) * mask[..., None]
  return y, (y[..., :2] * x[..., :2]).astype(x.dtype)


def _run(is_whole, axis, inputs):
  *inputs, mask, d_outputs = inputs

  def call(w, b, x):
    return mapping.map_rows(
      _function, (w, {'b': b}), x, mask, axis=axis, is_whole=is_whole
    )

  outputs, vjp = jax.vjp(jax.jit(call), *inputs)
  return outputs, vjp(d_outputs)


def _inputs(arrays, axis, dtype=jnp.float32):
  lead = (R, T) if axis == 0 else (T, R)
  w, b, x, d_y, d_z = arrays(
    (M, C), (C,), (*lead, M), (*lead, C), (*lead, 2), dtype=dtype
  )
  mask = np.random.default_rng(0).random(lead) < 0.7
  return w, b, x, jnp.asarray(mask), (d_y, d_z)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('rows', [1, 4, 10])  # even and ragged
def test_blocks_give_the_whole_and_its_gradients(
  axis, rows, arrays, assert_close, monkeypatch
):
  monkeypatch.setattr(mapping, '_POSITIONS', rows * T)
  inputs = _inputs(arrays, axis)
  expected = jax.tree.leaves(_run(True, axis, inputs))
  for one, two in zip(
    jax.tree.leaves(_run(False, axis, inputs)), expected, strict=True
  ):
    assert_close(one, two)


def test_gradients_of_shared_arrays_are_summed_in_float32(
  arrays, assert_close, monkeypatch
):
  monkeypatch.setattr(mapping, '_POSITIONS', 1)
  ones = jnp.ones((600, 1, 1), jnp.bfloat16)

  def total(w):
    return mapping.map_rows(lambda w, x: x * w, w, ones).sum(dtype=jnp.float32)

  # In bfloat16 the sum would stay at 256.
  grad = jax.grad(total)(jnp.ones((), jnp.bfloat16))
  assert grad.dtype == jnp.bfloat16
  assert_close(grad, np.float32(600), dtype='bfloat16')


def test_memory_is_that_of_a_block(monkeypatch):
  monkeypatch.setattr(mapping, '_POSITIONS', 64)

  def bytes_of(is_whole):
    def call(w, x):
      def hidden(w, x):
        return jnp.tanh(x @ w) @ w.T

      y = mapping.map_rows(hidden, w, x, is_whole=is_whole)
      return y.sum()

    shapes = (
      jax.ShapeDtypeStruct((8, 1024), jnp.float32),
      jax.ShapeDtypeStruct((64, 64, 8), jnp.float32),
    )
    compiled = jax.jit(jax.grad(call, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert bytes_of(False) < bytes_of(True) / 10
