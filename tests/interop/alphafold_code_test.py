"""AlphaFold's own code, where it is installed: captured and edited."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Edit
from attention.interop import alphafold

modules = pytest.importorskip(
  'alphafold.model.modules', reason="AlphaFold's code is not installed"
)
NUM_RES, NUM_SEQ, NUM_EXTRA, BLOCKS = 11, 5, 7, 3
PATH = 'evoformer/evoformer_iteration'
LAYERS = {
  'msa_row_attention_with_pair_bias/attention': (NUM_SEQ, 8),
  'triangle_attention_starting_node/attention': (NUM_RES, 4),
  'triangle_attention_ending_node/attention': (NUM_RES, 4),
}


@pytest.fixture(scope='module')
def evoformer():
  """(function, params, batch) of AlphaFold's trunk with three blocks."""
  from alphafold.model import config as configs

  config = configs.model_config('model_3').model
  config.global_config.update(
    {'use_remat': True, 'zero_init': False, 'deterministic': True}
  )
  trunk = config.embeddings_and_evoformer
  trunk.update(
    {
      'evoformer_num_block': BLOCKS,
      'extra_msa_stack_num_block': 2,
      'msa_channel': 16,
      'pair_channel': 8,
      'extra_msa_channel': 8,
      'seq_channel': 16,
      'recycle_pos': False,
      'recycle_features': False,
    }
  )
  trunk.template.enabled = False
  rng = np.random.default_rng(0)
  aatype = rng.integers(0, 20, NUM_RES)
  extra = (NUM_EXTRA, NUM_RES)
  batch = {
    'aatype': aatype,
    'target_feat': np.eye(22)[aatype + 1],
    'msa_feat': rng.normal(size=(NUM_SEQ, NUM_RES, 49)),
    'msa_mask': np.ones((NUM_SEQ, NUM_RES)),
    'seq_mask': np.ones(NUM_RES),
    'residue_index': np.arange(NUM_RES),
    'extra_msa': rng.integers(0, 20, extra),
    'extra_has_deletion': np.zeros(extra),
    'extra_deletion_value': np.zeros(extra),
    'extra_msa_mask': np.ones(extra),
  }
  batch = {
    name: jnp.asarray(x, jnp.float32 if x.dtype == float else jnp.int32)
    for name, x in batch.items()
  }

  def function(batch):
    return modules.EmbeddingsAndEvoformer(trunk, config.global_config)(
      batch, is_training=False
    )

  with alphafold.use_in(modules):
    model = hk.transform(function)
    params = jax.jit(model.init)(jax.random.key(0), batch)
    yield function, params, batch


def _apply(function, params, batch):
  model = hk.transform(function)
  return jax.jit(model.apply)(params, jax.random.key(1), batch)


def test_attention_of_every_block_is_captured(evoformer):
  function, params, batch = evoformer
  output, values = jax.jit(
    lambda p, b: attention.capture(
      function,
      p,
      b,
      what=('pattern', 'block_output'),
      layers=f'{PATH}/*',
      rng=jax.random.key(1),
    )
  )(params, batch)
  expected = _apply(function, params, batch)
  np.testing.assert_allclose(output['pair'], expected['pair'], atol=1e-5)
  for layer, (rows, heads) in LAYERS.items():
    pattern = values['pattern'][f'{PATH}/{layer}']
    assert pattern.shape == (BLOCKS, rows, heads, NUM_RES, NUM_RES)
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
  for stream in ('msa', 'pair'):
    last = values['block_output'][f'{PATH}/{stream}'][-1]
    np.testing.assert_allclose(last, expected[stream], atol=1e-5)


def test_a_head_of_one_block_is_ablated(evoformer):
  function, params, batch = evoformer
  run = jax.jit(
    lambda p, b: {
      layer: attention.edit(
        function,
        p,
        {f'{PATH}/{layer}[1]': Edit('pattern', heads=[2])},
        b,
        rng=jax.random.key(1),
      )['pair']
      for layer in LAYERS
    }
  )
  for layer, pair in run(params, batch).items():
    path = f'{PATH}/{layer}'
    w = params[path]['output_w'].at[1, 2].set(0)
    without = params | {path: params[path] | {'output_w': w}}
    expected = _apply(function, without, batch)['pair']
    np.testing.assert_allclose(pair, expected, atol=2e-5)
