"""Fixtures and settings of all tests."""

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
  """Skips optimisations: the default tests compile more than they compute."""
  if config.option.markexpr == 'not slow':
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # for subprocesses
    jax.config.update('jax_disable_most_optimizations', True)
    if jax.__version_info__ < (0, 11):  # later XLA has no other emitters
      flags = os.environ.get('XLA_FLAGS', '')
      os.environ['XLA_FLAGS'] = f'{flags} --xla_cpu_use_fusion_emitters=false'


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
    # NumPy's, as JAX would compile a program for each shape.
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.dtype(dtype)) for s in shapes]

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
