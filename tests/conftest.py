"""Fixtures and settings of all tests."""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import tempfile

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

# How far results may be from the truth, by dtype: relative to the largest
# value that is compared.
_TOLERANCES = {'float32': 2e-5, 'bfloat16': 2e-2, 'float16': 4e-3}


def pytest_configure(config):
  """Reduces compilation, which takes most of the default tests' time."""
  if config.option.markexpr != 'not slow':
    return
  # Environment variables, for subprocesses, and JAX's own settings.
  if not hasattr(config, 'workerinput'):
    cache = tempfile.mkdtemp(prefix='attention_tests_')
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    if jax.__version_info__ < (0, 11):  # later XLA has no other emitters
      # One part a program: there are not the cores to compile more at once.
      flags = (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_cpu_use_fusion_emitters=false',
        '--xla_cpu_parallel_codegen_split_count=1',
      )
      os.environ['XLA_FLAGS'] = ' '.join(flags).strip()
  settings = {
    'jax_disable_most_optimizations': True,
    # Shared by the workers and by runs in processes of their own.
    'jax_compilation_cache_dir': os.environ['JAX_COMPILATION_CACHE_DIR'],
    'jax_persistent_cache_min_compile_time_secs': 0.15,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in settings.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


def pytest_collection_modifyitems(items):
  """Puts runs first: they take longest, and would leave a worker idle."""
  items.sort(key=lambda item: 'training' not in item.path.parts)


@pytest.fixture
def real_files():
  """The folder of real files, which is not part of the project."""
  folder = os.environ.get('ATTENTION_TEST_DATA')
  if not folder:
    pytest.skip('ATTENTION_TEST_DATA is unset')
  return pathlib.Path(folder)


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


@pytest.fixture(scope='session')
def arrays():
  """arrays(shape, …): normal float32 arrays, the same in every test run."""

  def make(*shapes, dtype=jnp.float32, seed=0):
    # NumPy's, as JAX would compile a program for each shape.
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.dtype(dtype)) for s in shapes]

  return make


@pytest.fixture(scope='session')
def random_params():
  """random_params(function, *inputs): parameters of which none is 0 or 1."""

  def make(function, *inputs):
    params = jax.jit(hk.transform(function).init)(jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(
      lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params
    )

  return make


@pytest.fixture(scope='session')
def assert_near():
  """assert_near(actual, expected, atol): of trees, within an absolute error."""

  def check(actual, expected, atol=1e-6):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
      actual,
      expected,
    )

  return check


@pytest.fixture(scope='session')
def numpy_gpt():
  """numpy_gpt(params, tokens, num_heads=…): a GPT in NumPy, all it computes."""
  path = pathlib.Path(__file__).with_name('numpy_gpt.py')
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.run


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
