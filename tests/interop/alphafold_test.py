"""Tests of AlphaFold's classes: substitution, configs, masks and dropout."""

import sys
import types

import haiku as hk
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import attention
from attention.interop import alphafold
from attention.modules.evoformer import drop_shared

S, N, A, Z = 5, 7, 12, 8
_PACKAGE = 'alphafold_standin'
# Sources of a sibling module, and of the module whose classes are replaced.
_SIBLING = """
import jax.numpy as jnp

def clipped(x):
  return jnp.clip(x, a_min=0, a_max=2)
"""
_MODULES = """
import haiku as hk
import jax
import jax.numpy as jnp

traced = []

class Attention(hk.Module):
  def __init__(self, config, global_config, output_dim, name='attention'):
    super().__init__(name=name)
    self.config, self.output_dim = config, output_dim

  def __call__(self, q_data, m_data, mask, nonbatched_bias=None):
    traced.append('theirs')
    a, h = q_data.shape[-1], self.config.num_head
    init = hk.initializers.VarianceScaling(1.0, 'fan_avg', 'uniform')
    def get(name, *shape, init=init):
      return hk.get_parameter(name, shape, q_data.dtype, init)
    q = jnp.einsum('bqa,ahc->bqhc', q_data, get('query_w', a, h, a // h))
    k = jnp.einsum('bka,ahc->bkhc', m_data, get('key_w', a, h, a // h))
    v = jnp.einsum('bka,ahc->bkhc', m_data, get('value_w', a, h, a // h))
    logits = jnp.einsum('bqhc,bkhc->bhqk', q * (a // h) ** -0.5, k)
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
    x = jnp.einsum('bhqk,bkhc->bqhc', weights, v)
    w = get('output_w', h, a // h, self.output_dim)
    b = get('output_b', self.output_dim, init=jnp.zeros)
    return jnp.einsum('bqhc,hco->bqo', x, w) + b

class Other:
  pass

def model(config, x, mask):
  return Attention(config, config, x.shape[-1])(x, x, mask)
"""


# The signature of ColabFold and older AlphaFold versions.
_WITH_BIAS = (
  _MODULES.replace('m_data, mask,', 'm_data, bias,')
  .replace('jnp.where(mask, logits, -1e9)', 'logits + bias')
  .replace('(x, x, mask)', '(x, x, 1e9 * (mask - 1))')
)


def _module(name, source):
  module = types.ModuleType(f'{_PACKAGE}.{name}')
  exec(source, vars(module))
  return module


@pytest.fixture(params=[_MODULES, _WITH_BIAS], ids=['mask', 'bias'])
def modules(monkeypatch, request):
  """A stand-in for AlphaFold's package, with one of its classes."""
  sources = {'a': _SIBLING, 'modules': request.param}
  made = {n: _module(n, s) for n, s in sources.items()}
  for module in made.values():
    monkeypatch.setitem(sys.modules, module.__name__, module)
  made['modules'].sibling = made['a']
  return made['modules']


@pytest.fixture
def call(modules, arrays):
  """The stand-in's model, its parameters and its inputs."""
  config = ml_collections.ConfigDict(
    dict(num_head=3, gating=False, zero_init=False)
  )
  (x,) = arrays((S, N, A))
  mask = (np.random.default_rng(0).random((S, 1, 1, N)) < 0.7).astype('f')
  mask[..., 0] = 1
  model = hk.transform(lambda x, mask: modules.model(config, x, mask))
  return model, model.init(jax.random.key(0), x, mask), (x, mask)


def test_use_in_replaces_and_restores_classes(modules):
  before, sibling = dict(vars(modules)), dict(vars(modules.sibling))
  with alphafold.use_in(modules):
    assert issubclass(modules.Attention, alphafold.Attention)
    assert modules.Other is before['Other']
    assert not hasattr(modules, 'Transition')
  assert vars(modules) == before
  with pytest.raises(ZeroDivisionError), alphafold.use_in(modules):
    raise ZeroDivisionError
  assert vars(modules) == before and vars(modules.sibling) == sibling


def test_use_in_retraces_previously_jitted_functions(
  modules, call, assert_close
):
  model, params, inputs = call
  jitted = jax.jit(model.apply)
  theirs = jitted(params, None, *inputs)
  del modules.traced[:]
  with alphafold.use_in(modules):
    ours = jitted(params, None, *inputs)
    assert not modules.traced
  assert_close(ours, theirs)
  assert_close(jitted(params, None, *inputs), theirs)
  assert modules.traced == ['theirs']


def test_initial_parameters_are_identical(modules, call):
  model, theirs, inputs = call
  with alphafold.use_in(modules):
    ours = model.init(jax.random.key(0), *inputs)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_removed_argument_names_work_inside_use_in_only(modules):
  x = jnp.arange(-2, 5)
  with alphafold.use_in(modules):
    assert modules.sibling.clipped(x).max() == 2
    assert modules.jnp.clip(x, 0, 1).max() == 1
    assert modules.jnp.clip(x, min=0).min() == 0
    assert modules.jnp.float32 is jnp.float32
  with pytest.raises(TypeError):
    modules.sibling.clipped(x)


def test_use_in_raises_without_alphafold_classes():
  with (
    pytest.raises(ValueError, match='modules: expected'),
    alphafold.use_in(types.ModuleType('nothing')),
  ):
    pass


def _config(**changes):
  """A small version of AlphaFold's config."""
  drop = dict(shared_dropout=True, orientation='per_row')
  msa = dict(num_head=2, gating=True, dropout_rate=0.15, **drop)
  pair = dict(num_head=4, gating=True, dropout_rate=0.25, **drop)
  product = dict(
    num_intermediate_channel=6,
    fuse_projection_weights=False,
    dropout_rate=0.25,
    **drop,
  )
  transition = dict(num_intermediate_factor=2, dropout_rate=0.0, **drop)
  columns = dict(orientation='per_column')
  return ml_collections.ConfigDict(
    dict(
      msa_row_attention_with_pair_bias=msa,
      msa_column_attention=msa | columns | dict(dropout_rate=0.0),
      msa_transition=transition,
      outer_product_mean=dict(
        num_outer_channel=3, first=False, dropout_rate=0.0, **drop
      ),
      triangle_multiplication_outgoing=product | dict(equation='ikc,jkc->ijc'),
      triangle_multiplication_incoming=product | dict(equation='kjc,kic->ijc'),
      triangle_attention_starting_node=pair,
      triangle_attention_ending_node=pair | columns,
      pair_transition=transition,
    )
    | changes
  )


def _global_config(**changes):
  return ml_collections.ConfigDict(
    dict(zero_init=False, deterministic=False) | changes
  )


class _SafeKey:
  """A SafeKey that records which of its keys are used."""

  def __init__(self, key, name='', used=None):
    self.key, self.name = key, name
    self.used = [] if used is None else used

  def get(self):
    self.used.append(self.name)
    return self.key

  def split(self, number):
    keys = jax.random.split(self.key, number)
    return tuple(_SafeKey(k, i, self.used) for i, k in enumerate(keys))


def _used_keys(is_training, **changes):
  """Indices of AlphaFold's ten keys that a block uses for dropout."""
  safe_key = _SafeKey(jax.random.key(2))

  def block(msa, pair):
    layer = alphafold.EvoformerIteration(
      config=_config(),
      global_config=_global_config(**changes),
      is_extra_msa=False,
    )
    return layer(
      activations={'msa': msa, 'pair': pair},
      masks={'msa': jnp.ones((S, N)), 'pair': jnp.ones((N, N), 'i4')},
      is_training=is_training,
      safe_key=safe_key,
    )

  shapes = (jnp.ones((S, N, A)), jnp.ones((N, N, Z)))
  jax.eval_shape(hk.transform(block).init, jax.random.key(0), *shapes)
  return safe_key.used


def test_dropout_uses_the_same_keys_as_alphafold():
  # The keys of row attention and of the four triangle layers.
  assert _used_keys(True) == [1, 5, 6, 7, 8]
  assert _used_keys(False) == []
  assert _used_keys(True, deterministic=True) == []
  assert _used_keys(False, eval_dropout=True) == [1, 5, 6, 7, 8]


def test_dropout_is_shared_along_its_axis(arrays):
  (x,) = arrays((S, N, A))
  kept = np.asarray(drop_shared(jax.random.key(0), 0.5, 1, x) != 0)
  assert (kept == kept[:, :1]).all() and 0.2 < kept.mean() < 0.8
  free = np.asarray(drop_shared(jax.random.key(0), 0.5, None, x) != 0)
  assert (free != free[:, :1]).any()


@pytest.mark.parametrize('dtype', ['bool', 'int8', 'float32', 'bfloat16'])
def test_masks_of_any_dtype_are_accepted(dtype, arrays, assert_close):
  (x,) = arrays((S, N, A))
  ones = np.random.default_rng(0).random((1, 1, 1, N)) < 0.7
  config = ml_collections.ConfigDict(dict(num_head=2, gating=True))

  def run(mask):
    model = hk.transform(
      lambda x: alphafold.Attention(config, _global_config(), A)(
        q_data=x, m_data=x, mask=mask
      )
    )
    return model.apply(model.init(jax.random.key(0), x), None, x)

  assert_close(run(jnp.asarray(ones).astype(dtype)), run(ones))


_SMALL = dict(num_head=2, gating=True, orientation='per_row')


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: alphafold.Attention(
        ml_collections.ConfigDict(dict(gating=True)), _global_config(), A
      ),
      "config: expected a key 'num_head', got none; AlphaFold uses 8",
    ),
    (
      lambda: alphafold.Attention(types.SimpleNamespace(), None, A),
      "config: expected a key 'num_head'",
    ),
    (
      lambda: alphafold.Attention(
        ml_collections.ConfigDict(_SMALL | dict(key_dim=7)),
        _global_config(),
        A,
      ),
      'key_dim: expected a multiple of num_head=2, got 7',
    ),
    (
      lambda: alphafold.TriangleAttention(
        ml_collections.ConfigDict(_SMALL), ml_collections.ConfigDict()
      ),
      "global_config: expected a key 'zero_init'",
    ),
    (
      lambda: alphafold.MSAColumnAttention(
        ml_collections.ConfigDict(_SMALL), _global_config()
      ),
      "orientation: expected 'per_column', got 'per_row'",
    ),
    (
      lambda: alphafold.TriangleMultiplication(
        ml_collections.ConfigDict(), _global_config()
      ),
      "config: expected a key 'equation'.*ikc,jkc->ijc",
    ),
    (
      lambda: alphafold.TriangleAttention(
        ml_collections.ConfigDict(_SMALL), _global_config()
      )(jnp.ones((N, N, Z)), jnp.ones((N,))),
      'pair_mask: expected shape',
    ),
    (
      lambda: alphafold.Attention(
        ml_collections.ConfigDict(_SMALL), _global_config(), A
      )(jnp.ones((S, N, A)), jnp.ones((S, N, A)), jnp.ones((S, N))),
      'mask: expected .* of rank 4',
    ),
  ],
)
def test_invalid_inputs_raise(make, message):
  with pytest.raises(ValueError, match=message):
    hk.transform(make).init(jax.random.key(0))


def test_attention_takes_the_shapes_of_alphafolds_docstrings(
  arrays, assert_close
):
  x, bias = arrays((3, N, A), (N, N))
  mask = np.random.default_rng(0).integers(0, 2, (3, N, N))
  config = ml_collections.ConfigDict(
    {'num_head': 3, 'gating': True, 'zero_init': False}
  )

  @hk.transform
  def run(mask, bias):
    return alphafold.Attention(config, config, A)(x, x, mask, bias)

  params = run.init(jax.random.key(0), mask, bias)
  short = run.apply(params, None, mask, bias)
  heads = jnp.broadcast_to(bias, (3, N, N))
  assert_close(short, run.apply(params, None, mask[:, None], heads))


def test_classes_are_subclasses_of_the_modules():
  assert issubclass(alphafold.Attention, attention.GatedAttention)
  assert issubclass(alphafold.GlobalAttention, attention.GlobalAttention)
