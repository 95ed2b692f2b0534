"""Products of layers: near float32, with bfloat16 operands, gradients too."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention.ops import meshes, products

_EQUATIONS = {  # shapes of the operands, by the sum that they enter
  'ta,ao->to': ((5, 7), (7, 3)),
  'bta,ao->bto': ((2, 5, 7), (7, 3)),
  'bta,ahc->bthc': ((2, 5, 7), (7, 3, 11)),
  'bthc,hco->bto': ((2, 5, 3, 11), (3, 11, 7)),
}


def _axes(equation):
  left, right = equation.split('->')[0].split(',')
  return len(set(left) & set(right))


def _dots(jaxpr):
  """The dtypes of the operands and results of all products."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      arrays = (*equation.invars, *equation.outvars)
      found.append(tuple(x.aval.dtype.name for x in arrays))
    for leaf in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(leaf, 'jaxpr', leaf)
      found += _dots(inner) if hasattr(inner, 'eqns') else []
  return found


def _loss(axes=1):
  # A new function, as JAX would reuse the trace of another context.
  return lambda x, w: jnp.sin(products.dot(x, w, axes)).sum()


@pytest.mark.parametrize('equation', _EQUATIONS)
def test_results_and_gradients_are_float32_near_the_exact_ones(
  equation, arrays, assert_close
):
  x, w = arrays(*_EQUATIONS[equation])
  axes = _axes(equation)
  exact = jnp.einsum(equation, x, w)
  plain = products.dot(x, w, axes)
  assert_close(plain, exact)
  d_plain = jax.grad(_loss(axes), (0, 1))(x, w)
  with products.operands_in(jnp.bfloat16):
    rounded = jax.jit(lambda *a: products.dot(*a, axes))(x, w)
    d_rounded = jax.jit(jax.grad(_loss(axes), (0, 1)))(x, w)
  for got, expected in zip(
    (rounded, *d_rounded), (plain, *d_plain), strict=True
  ):
    assert got.dtype == jnp.float32
    assert_close(got, expected, 'bfloat16')
    assert (got != expected).any()


def test_sums_are_exact_products_of_rounded_operands(arrays, assert_close):
  x, w, d = arrays((513, 7), (7, 3), (513, 3))

  def pull_back(x, w, d):
    y, pull = jax.vjp(lambda x, w: products.dot(x, w), x, w)
    return y, *pull(d)

  with products.operands_in(jnp.bfloat16):
    y, d_x, d_w = jax.jit(pull_back)(x, w, d)
  x, w, d = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, d))
  assert_close(y, x @ w)
  assert_close(d_x, d @ w.T)
  assert_close(d_w, x.T @ d)


def test_all_products_take_bfloat16_and_return_float32(arrays):
  x, w = arrays((2, 5, 7), (7, 3))
  with products.operands_in(jnp.bfloat16):
    traced = jax.make_jaxpr(jax.grad(_loss(), (0, 1)))(x, w)
  dots = _dots(traced.jaxpr)
  assert len(dots) == 6  # three, for CPUs and for other platforms
  assert set(dots) == {('bfloat16', 'bfloat16', 'float32')}


def test_the_gradient_has_the_dtype_of_the_forward_pass(arrays):
  x, w = arrays((5, 7), (7, 3))
  with products.operands_in(jnp.bfloat16):
    _, pull = jax.vjp(lambda x, w: products.dot(x, w), x, w)
  outside = jax.make_jaxpr(pull)(jnp.ones((5, 3)))
  assert set(_dots(outside.jaxpr)) == {('bfloat16', 'bfloat16', 'float32')}
  _, pull = jax.vjp(lambda x, w: products.dot(x, w), x, w)
  with products.operands_in(jnp.bfloat16):
    inside = jax.make_jaxpr(pull)(jnp.ones((5, 3)))
  assert set(_dots(inside.jaxpr)) == {('float32', 'float32', 'float32')}


def test_only_rounded_operands_are_saved(arrays):
  x, w = arrays((5, 7), (7, 3))
  with products.operands_in(jnp.bfloat16):
    _, pull = jax.vjp(lambda x, w: products.dot(x, w), x, w)
  saved = {(a.shape, a.dtype.name) for a in jax.tree.leaves(pull)}
  assert saved == {((5, 7), 'bfloat16'), ((7, 3), 'bfloat16')}


@pytest.mark.parametrize('equation', _EQUATIONS)
def test_outside_the_context_products_are_plain(equation, arrays):
  x, w = arrays(*_EQUATIONS[equation])
  axes = _axes(equation)

  def results(product):
    def loss(x, w):
      y = product(x, w)
      return jnp.sin(y).sum(), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)

  expected = results(lambda x, w: jnp.einsum(equation, x, w))
  with products.operands_in(jnp.bfloat16):
    pass
  got = results(lambda x, w: products.dot(x, w, axes))
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  tangent = jax.jvp(lambda x: products.dot(x, w, axes), (x,), (x,))[1]
  np.testing.assert_array_equal(tangent, products.dot(x, w, axes))


def test_low_dtypes_and_a_given_precision_are_left_alone(arrays):
  x, w = arrays((5, 7), (7, 3))
  half = x.astype(jnp.float16), w.astype(jnp.float16)
  with products.operands_in(jnp.bfloat16):
    kept = jax.make_jaxpr(lambda *a: products.dot(*a))(*half)
    named = jax.make_jaxpr(lambda *a: products.dot(*a, precision='highest'))
    assert _dots(kept.jaxpr) == [('float16',) * 3]
    assert _dots(named(x, w).jaxpr) == [('float32',) * 3]
    with products.operands_in(None):
      plain = jax.make_jaxpr(lambda *a: products.dot(*a))(x, w)
    assert _dots(plain.jaxpr) == [('float32',) * 3]


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_accelerators_get_plain_products(platform, arrays):
  x, w = arrays((5, 7), (7, 3))
  with products.operands_in(jnp.bfloat16):
    traced = jax.jit(jax.grad(_loss(), (0, 1))).trace(x, w)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  dots = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(dots) == 3
  for line in dots:
    operands, result = line.split(' : ')[1].split(' -> ')
    assert operands.count('bf16') == 2 and 'f32' in result
  is_cpu = platform == 'cpu'
  assert ('optimization_barrier' in text) == is_cpu
  assert ('transpose' in text) == is_cpu


_OPTIMISED = """
import pathlib, re
import jax
import jax.numpy as jnp
import numpy as np
from attention.ops import products

def loss(x, w):
  return jnp.sin(0.1 * products.dot(x.T, w.T).T).sum()

rng = np.random.default_rng(0)
x, w = (rng.normal(size=s).astype('f') for s in ((32, 16), (8, 32)))
exact = jax.grad(loss, (0, 1))(x, w)
with products.operands_in(jnp.bfloat16):
  program = jax.jit(jax.grad(lambda *a: loss(*a), (0, 1))).lower(x, w).compile()
for got, expected in zip(program(x, w), exact):
  np.testing.assert_allclose(got, expected, atol=0.02 * abs(expected).max())
info = pathlib.Path('/proc/cpuinfo')
if info.exists() and 'avx512_bf16' in info.read_text():
  found = 0
  for computation in program.as_text().split('\\n\\n'):
    for operands in re.findall(r' dot\\((.*?)\\)', computation):
      for name in operands.split(', '):
        assert f'{name} = bf16[' in computation, computation
        found += 1
  assert found == 6
"""


def test_transposed_operands_and_results_compute_with_all_optimisations():
  # XLA for CPUs would move the transpositions into the products, and refuse
  # them when they run. Tests compile without most optimisations.
  kept = ('JAX_', 'XLA_')
  env = {k: v for k, v in os.environ.items() if not k.startswith(kept)}
  env['JAX_PLATFORMS'] = os.environ.get('JAX_PLATFORMS', '')
  done = subprocess.run(
    [sys.executable, '-c', _OPTIMISED], env=env, capture_output=True, text=True
  )
  assert not done.returncode, done.stderr


def test_loops_remat_and_vmap_keep_the_operands(arrays, assert_close):
  x, w = arrays((4, 5, 7), (3, 7, 7))

  def loss(x, w):
    def layer(x, w):
      return jnp.tanh(products.dot(x, w)), None

    def of_row(x):
      return jax.lax.scan(jax.checkpoint(layer), x, w)[0]

    return jax.vmap(of_row)(x).sum()

  exact = jax.grad(loss, (0, 1))(x, w)
  with products.operands_in(jnp.bfloat16):
    grad = jax.grad(lambda *a: loss(*a), (0, 1))
    dots = _dots(jax.make_jaxpr(grad)(x, w).jaxpr)
    found = jax.jit(grad)(x, w)
  assert set(dots) == {('bfloat16', 'bfloat16', 'float32')}
  jax.tree.map(lambda a, b: assert_close(a, b, 'bfloat16', 2), found, exact)


def test_axes_of_positions_stay_under_a_mesh_that_cuts_them(arrays):
  x, w = arrays((2, 6, 7), (7, 3))
  mesh = jax.sharding.AbstractMesh(
    (1, 1, 2), (*meshes.BATCH, meshes.CONTEXT), (AxisType.Auto,) * 3
  )
  with jax.sharding.use_abstract_mesh(mesh), products.operands_in('bfloat16'):
    text = str(jax.make_jaxpr(jax.grad(_loss(), (0, 1)))(x, w))
  assert 'bf16[2,6,7]' in text and '[12,' not in text
