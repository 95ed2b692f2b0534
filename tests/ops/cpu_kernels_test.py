"""The C++ kernels: each instruction set, and what happens without them."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.ops import cpu_kernels

_FOLDER = pathlib.Path(cpu_kernels.__file__).parent

# Prints the instruction set, and the largest errors of attention, its gradient
# and products against plain XLA.
_COMPARE = """
import jax, jax.numpy as jnp, numpy as np
import attention
from attention.ops import cpu_kernels, few_rows

rng = np.random.default_rng(0)
def normal(*shape, dtype='float32'):
  return jnp.asarray(rng.normal(size=shape), dtype)

def attend(name):
  def total(q, k, v, bias):
    y = attention.dot_product_attention(
      q, k, v, bias=bias, mask=attention.Mask.window(70, 9), logit_cap=2.0,
      sinks=jnp.ones(4), dropout_rate=0.2, dropout_rng=jax.random.key(1),
      implementation=name)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y
  return jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))

inputs = normal(3, 90, 4, 20), normal(3, 150, 2, 20), normal(3, 150, 2, 13)
inputs += (normal(4, 90, 150),)
fused, exact = (
  jax.tree.leaves(attend(name)(*inputs)) for name in ('fused', 'reference'))
errors = [float(abs(x - y).max() / abs(y).max()) for x, y in zip(fused, exact)]
for rows in (1, 3, 16):
  for dtype in ('float32', 'bfloat16'):
    x, w = normal(rows, 130), normal(130, 333, dtype=dtype)
    exact = x @ w.astype('float32')
    for is_transposed in (False, True):
      given = w.T if is_transposed else w
      assert few_rows.is_supported(x, given)
      y = jax.jit(few_rows.product, static_argnums=0)(is_transposed, x, given)
      errors.append(float(abs(y - exact).max() / abs(exact).max()))
print(cpu_kernels.instruction_set(), max(errors))
"""


@pytest.mark.parametrize('asked', ['AVX-512', 'AVX2', 'baseline'])
def test_each_instruction_set_matches_the_reference(asked, monkeypatch):
  if reason := cpu_kernels.reason():
    pytest.skip(reason)
  monkeypatch.setenv('ATTENTION_INSTRUCTION_SET', asked)
  result = subprocess.run(
    [sys.executable, '-c', _COMPARE], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  used, error = result.stdout.split()
  if used != asked:
    pytest.skip(f'this processor has no {asked}')
  assert float(error) < 2e-5


@pytest.mark.parametrize('heads', [(8, 2, 1), (4, 4, 1), (4, 2, 4)])
def test_heads_that_share_a_bias_add_to_its_gradient_in_turn(heads):
  if reason := cpu_kernels.reason():
    pytest.skip(reason)
  num_heads, num_key_heads, bias_heads = heads
  normal = np.random.default_rng(0).normal
  query = normal(size=(1, 600, num_heads, 8)).astype('f')
  key, value = normal(size=(2, 1, 600, num_key_heads, 8)).astype('f')
  bias = normal(size=(bias_heads, 600, 600)).astype('f')

  def gradient(implementation):
    def total(bias):
      y = attention.dot_product_attention(
        query, key, value, bias=bias, implementation=implementation
      )
      return jnp.square(y).sum()

    return jax.jit(jax.grad(total))

  fused = gradient('fused')
  first = fused(bias)
  expected = gradient('reference')(bias)
  np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-4)
  for _ in range(5):
    np.testing.assert_array_equal(fused(bias), first)


@pytest.fixture
def fresh():
  """Forget whether the kernels could be loaded, before and after."""
  cpu_kernels.reason.cache_clear()
  yield
  cpu_kernels.reason.cache_clear()


@pytest.mark.parametrize(
  ('content', 'message'),
  [(None, 'are not built'), (b'no library', 'cannot be loaded')],
)
def test_without_a_library_the_reason_is_reported(
  content, message, fresh, tmp_path, monkeypatch
):
  path = tmp_path / 'kernels.so'
  if content is not None:
    path.write_bytes(content)
  monkeypatch.setattr(cpu_kernels, 'library_path', lambda: path)
  x = jnp.ones((1, 8, 1, 4))
  ((name, reason), (other, status), _) = attention.explain(x, x, x)
  assert (name, other, status) == ('fused', 'chunked', 'chosen')
  assert message in reason and '\n' not in reason
  with pytest.raises(NotImplementedError, match=message):
    attention.dot_product_attention(x, x, x, implementation='fused')
  np.testing.assert_array_equal(attention.dot_product_attention(x, x, x), x)


def test_what_is_refused_goes_to_the_loops():
  if reason := cpu_kernels.reason():
    pytest.skip(reason)
  x = jnp.ones((2, 8, 1, 4), jnp.float16)
  y = jnp.ones((2, 8, 1, 4))
  dense = attention.Mask.dense(np.ones((8, 8), bool))
  ids = attention.Mask.segments(np.zeros((2, 8), int))
  for inputs, mask, message in (
    (x, None, 'expected float32 or bfloat16, got float16'),
    (y, dense & dense, 'expected at most one dense mask'),
    (y, ids & ids, 'expected at most one segment mask'),
  ):
    found = dict(attention.explain(*[inputs] * 3, mask=mask))
    assert found['fused'] == message
    assert found['chunked'] == 'chosen'
