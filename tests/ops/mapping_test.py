"""Mapping blocks of rows matches mapping all rows, including gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.ops import mapping
from attention.ops.platforms import PLATFORMS, by_platform

R, T, M, C = 11, 3, 5, 7


@pytest.fixture
def use_blocks(monkeypatch):
  """use_blocks(platform, rows): run a platform's path in blocks of `rows`."""

  def prepare(platform, rows):
    def run(choices, *args):
      chosen = dict(choices)[platform]
      return by_platform(tuple((p, chosen) for p in PLATFORMS), *args)

    monkeypatch.setattr(mapping, 'by_platform', run)
    monkeypatch.setattr(mapping, '_POSITIONS', rows * T)
    if platform != 'cpu':
      monkeypatch.setattr(mapping, '_POSITIONS', T)
      monkeypatch.setattr(mapping, '_LARGE', rows * T * C * 4)

  return prepare


def _function(shared, x, mask):
  w, more = shared
  y = jnp.tanh(x @ w + more['b']) * mask[..., None]
  return y, (y[..., :2] * x[..., :2]).astype(x.dtype)


def _run(is_whole, axis, inputs):
  *inputs, mask, d_outputs = inputs

  def apply(w, b, x):
    return mapping.map_rows(
      _function, (w, {'b': b}), x, mask, axis=axis, is_whole=is_whole
    )

  outputs, vjp = jax.vjp(jax.jit(apply), *inputs)
  return outputs, vjp(d_outputs)


def _inputs(arrays, axis, dtype=jnp.float32):
  lead = (R, T) if axis == 0 else (T, R)
  w, b, x, d_y, d_z = arrays(
    (M, C), (C,), (*lead, M), (*lead, C), (*lead, 2), dtype=dtype
  )
  mask = np.random.default_rng(0).random(lead) < 0.7
  return w, b, x, jnp.asarray(mask), (d_y, d_z)


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize(
  ('platform', 'rows'),  # even, ragged and whole blocks
  [('cpu', 1), ('cpu', 4), ('cpu', 10), ('cuda', 4), ('cuda', R)],
)
def test_blocks_match_whole_and_its_gradients(
  axis, platform, rows, arrays, assert_close, use_blocks
):
  use_blocks(platform, rows)
  inputs = _inputs(arrays, axis)
  expected = jax.tree.leaves(_run(True, axis, inputs))
  for one, two in zip(
    jax.tree.leaves(_run(False, axis, inputs)), expected, strict=True
  ):
    assert_close(one, two)


@pytest.mark.parametrize(('platform', 'rows'), [('cpu', 4), ('cuda', R)])
def test_blocks_support_vmap_scan_and_checkpoint(
  platform, rows, arrays, assert_close, use_blocks
):
  use_blocks(platform, rows)
  w, xs = arrays((M, M), (2, R, T, M))

  def gradients(is_whole):
    def layer(x, w):
      x = mapping.map_rows(
        lambda w, x: jnp.tanh(x @ w), w, x, is_whole=is_whole
      )
      return x, None

    def loss(w, x):
      ws = jnp.stack([w, 2 * w])
      return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, ws)[0]).sum()

    return jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (None, 0)))(w, xs)

  for one, two in zip(gradients(False), gradients(True), strict=True):
    assert_close(one, two)


def test_block_size_follows_lowering_platform():
  def apply(w, x):
    def hidden(w, x):
      scale = jnp.outer(w, w).max()  # large, but not for each row
      return jnp.tanh(x @ (scale * w))

    return mapping.map_rows(hidden, w, x)

  def program(rows, platform):
    shapes = (
      jax.ShapeDtypeStruct((8, 1024), jnp.float32),
      jax.ShapeDtypeStruct((rows, 64, 8), jnp.float32),
    )
    gradient = jax.jit(jax.grad(lambda *x: apply(*x).sum(), (0, 1)))
    lowered = gradient.trace(*shapes).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    blocks = re.findall(r'stablehlo.tanh .*tensor<(\d+)x64x1024xf32>', text)
    return set(map(int, blocks)), 'optimization_barrier' in text

  # 2,048 positions on CPUs, 64 MiB of hidden activations elsewhere.
  assert program(512, 'cpu') == ({32}, False)
  for platform in ('cuda', 'rocm', 'tpu'):
    assert program(512, platform) == ({256}, False)
    # A single block is recomputed as well.
    assert program(128, platform) == ({128}, True)


def test_shared_gradients_accumulate_in_float32(
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


def test_only_one_block_is_held_in_memory(monkeypatch):
  monkeypatch.setattr(mapping, '_POSITIONS', 64)

  def bytes_of(is_whole):
    def apply(w, x):
      def hidden(w, x):
        return jnp.tanh(x @ w) @ w.T

      y = mapping.map_rows(hidden, w, x, is_whole=is_whole)
      return y.sum()

    shapes = (
      jax.ShapeDtypeStruct((8, 1024), jnp.float32),
      jax.ShapeDtypeStruct((64, 64, 8), jnp.float32),
    )
    compiled = jax.jit(jax.grad(apply, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert bytes_of(False) < bytes_of(True) / 10
