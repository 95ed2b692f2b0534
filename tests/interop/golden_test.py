"""Comparison with recorded outputs and gradients of AlphaFold's modules."""

import json
import pathlib

import haiku as hk
import jax
import ml_collections
import numpy as np
import pytest

from attention.interop import alphafold

_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_FILES = sorted(path.stem for path in _GOLDEN.glob('*.npz'))
_CLASSES = {
  'attention': alphafold.Attention,
  'global_attention': alphafold.GlobalAttention,
  'msa_column_attention': alphafold.MSAColumnAttention,
  'msa_column_global_attention': alphafold.MSAColumnGlobalAttention,
  'msa_row_attention': alphafold.MSARowAttentionWithPairBias,
  'outer_product_mean': alphafold.OuterProductMean,
  'transition': alphafold.Transition,
  'triangle_attention': alphafold.TriangleAttention,
  'triangle_multiplication': alphafold.TriangleMultiplication,
}


def _model(name, config):
  global_config = ml_collections.ConfigDict(
    {'zero_init': False, 'deterministic': True}
  )
  if name.startswith('evoformer'):

    def block(msa, pair, msa_mask, pair_mask):
      layer = alphafold.EvoformerIteration(
        config, global_config, is_extra_msa='extra' in name
      )
      return layer(
        {'msa': msa, 'pair': pair}, {'msa': msa_mask, 'pair': pair_mask}
      )

    return block
  # The longest matching name, since some names are prefixes of others.
  kind = max((n for n in _CLASSES if name.startswith(n)), key=len)
  sizes = [
    config[key] for key in ('output_dim', 'num_output_channel') if key in config
  ]
  return lambda **inputs: {
    'act': _CLASSES[kind](config, global_config, *sizes)(**inputs)
  }


def _read(name):
  """Read a recording: model, inputs, parameters, outputs and gradients."""
  parts = {kind: {} for kind in ('in', 'out', 'cot', 'param', 'grad')}
  with np.load(_GOLDEN / f'{name}.npz') as arrays:
    config = ml_collections.ConfigDict(json.loads(str(arrays['cfg'])))
    for key in set(arrays.files) - {'cfg'}:
      kind, _, rest = key.partition(':')
      scope, _, leaf = rest.partition('//')
      if leaf:
        parts[kind].setdefault(scope, {})[leaf] = arrays[key]
      else:
        parts[kind][rest] = arrays[key]
  return hk.transform(_model(name, config)), parts


@pytest.mark.parametrize('name', _FILES)
def test_parameters_match_the_recording(name):
  model, parts = _read(name)
  shapes = jax.eval_shape(
    lambda rng: model.init(rng, **parts['in']), jax.random.key(0)
  )
  recorded = jax.tree.map(np.shape, parts['param'])
  assert jax.tree.map(lambda x: x.shape, shapes) == recorded


@pytest.mark.parametrize('name', _FILES)
def test_outputs_and_gradients_match_the_recording(name, assert_close):
  model, parts = _read(name)

  def run(params):
    outputs, vjp = jax.vjp(
      lambda p: model.apply(p, None, **parts['in']), params
    )
    return outputs, vjp(parts['cot'])[0]

  # Optimising would take longer than running the unoptimised program.
  options = {'xla_backend_optimization_level': 0}
  outputs, grads = jax.jit(run, compiler_options=options)(parts['param'])
  assert outputs.keys() == parts['out'].keys()
  for key, expected in parts['out'].items():
    assert_close(outputs[key], expected)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(parts['grad']))
  for module, leaf, grad in hk.data_structures.traverse(grads):
    expected = parts['grad'][module][leaf]
    # Terms constant over keys have zero gradients, up to rounding.
    if np.abs(expected).max() < 1e-6 * largest:
      assert np.abs(grad).max() < 1e-5 * largest
    else:
      assert_close(grad, expected, scale=5)  # 1e-4
