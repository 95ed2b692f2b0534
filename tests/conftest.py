"""What all tests share."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# How far results may be from the truth, by dtype: relative to the largest
# value that is compared.
_TOLERANCES = {'float32': 2e-5, 'bfloat16': 2e-2, 'float16': 4e-3}


def pytest_configure(config):
  """Short tests compile more than they compute: they skip optimisations."""
  if config.option.markexpr == 'not slow':
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # also of subprocesses
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def assert_close():
  """assert_close(actual, expected, dtype=…): in tolerance, finite, in shape."""

  def check(actual, expected, dtype=None, scale=1.0):
    actual, expected = np.asarray(actual), np.asarray(expected)
    dtype = jnp.dtype(dtype or actual.dtype).name
    assert actual.shape == expected.shape
    actual = actual.astype(np.float64)
    expected = expected.astype(np.float64)
    assert np.isfinite(actual).all()
    largest = max(np.abs(expected).max(initial=0), 1e-3)
    error = np.abs(actual - expected).max(initial=0) / largest
    assert error <= _TOLERANCES[dtype] * scale

  return check


@pytest.fixture
def arrays():
  """arrays(shape, …): normal float32 arrays, the same in every test run."""

  def make(*shapes, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [
      jax.random.normal(k, s).astype(dtype)
      for k, s in zip(keys, shapes, strict=True)
    ]

  return make


@pytest.fixture
def a_gpu():
  """with a_gpu(): what newer JAX asks for where no GPU is attached."""

  def context():
    if jax.__version_info__ < (0, 11):
      return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice('NVIDIA H100', 1, 'cuda')
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.sharding.AbstractMesh(
      (1,), ('x',), explicit, abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)

  return context


@pytest.fixture
def exact_products():
  """float32 products in float32, where accelerators' default is less."""
  with jax.default_matmul_precision('highest'):
    yield
