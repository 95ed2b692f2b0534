"""Tests of reading, validating and writing AlphaFold's parameter files."""

import json
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.interop import alphafold, alphafold_npz
from attention.modules.evoformer import EvoformerStack

_GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
_PREFIX = 'alphafold/alphafold_iteration/evoformer'
_HEAD = 'alphafold/alphafold_iteration/distogram_head/half_logits//weights'
S, N, A, E, Z = 5, 3, 12, 10, 8


def _stacks(msa, extra, pair):
  """Small versions of AlphaFold's two stacks."""
  sizes = dict(
    num_msa_head=2,
    num_pair_head=4,
    num_outer_channel=3,
    num_intermediate_channel=7,
    num_intermediate_factor=2,
    zero_init=False,
  )
  with alphafold.evoformer_scope():
    _, pair = EvoformerStack(
      **sizes, num_blocks=2, is_extra_msa=True, name='extra_msa_stack'
    )(extra, pair)
    return EvoformerStack(**sizes, num_blocks=3, name='evoformer_iteration')(
      msa, pair
    )


@pytest.fixture(scope='module')
def flat():
  """The arrays of a parameter file of a small AlphaFold."""
  shapes = jax.eval_shape(
    hk.transform(_stacks).init,
    jax.random.key(0),
    *(jnp.ones(s) for s in ((S, N, A), (S, N, E), (N, N, Z))),
  )
  rng = np.random.default_rng(0)
  arrays = {
    f'{module}//{name}': rng.normal(size=x.shape).astype('f')
    for module, name, x in hk.data_structures.traverse(shapes)
  }
  return arrays | {_HEAD: rng.normal(size=(2, 3)).astype('f2').T}


def test_saving_loaded_parameters_preserves_bytes(flat, tmp_path):
  np.savez(tmp_path / 'one.npz', **flat)
  params = alphafold.load_params(tmp_path / 'one.npz')
  alphafold.save_params(tmp_path / 'two.npz', params)
  with (
    np.load(tmp_path / 'one.npz') as one,
    np.load(tmp_path / 'two.npz') as two,
  ):
    assert one.files == two.files
    for key in one.files:
      assert one[key].dtype == two[key].dtype
      assert one[key].tobytes() == two[key].tobytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['one.npz', 'two.npz']


def test_loaded_parameters_match_the_stacks(flat, tmp_path):
  np.savez(tmp_path / 'one.npz', **flat)
  params = alphafold.load_params(tmp_path / 'one.npz')
  shapes = jax.eval_shape(
    hk.transform(_stacks).apply,
    params,
    None,
    *(jnp.ones(s) for s in ((S, N, A), (S, N, E), (N, N, Z))),
  )
  assert [x.shape for x in shapes] == [(S, N, A), (N, N, Z)]


@pytest.mark.parametrize('name', ['names_model_1', 'names_model_1_multimer_v3'])
def test_published_names_and_shapes_match_the_stacks(name):
  names = json.loads((_GOLDEN / f'{name}.json').read_text())
  flat = {k: np.broadcast_to(np.float32(0), s) for k, s in names.items()}
  for stack in ('evoformer_iteration', 'extra_msa_stack'):
    assert not alphafold_npz._differences(flat, stack)


_LAYER = f'{_PREFIX}/evoformer_iteration/pair_transition/transition1'


def test_missing_unexpected_and_misshapen_arrays_are_listed(flat, tmp_path):
  flat = dict(flat)
  flat[f'{_LAYER}//weights'] = np.zeros((3, Z, 5), 'f')
  flat[f'{_PREFIX}/extra_msa_stack/more//b'] = flat.pop(
    f'{_PREFIX}/extra_msa_stack/outer_product_mean//output_b'
  )
  np.savez(tmp_path / 'bad.npz', **flat)
  with pytest.raises(ValueError) as info:
    alphafold.load_params(tmp_path / 'bad.npz')
  message = str(info.value)
  assert 'missing outer_product_mean//output_b' in message
  assert 'unexpected more//b' in message
  assert (
    'pair_transition/transition1//weights expected (3, 8, 16), got (3, 8, 5)'
    in message
  )
  assert 'half_logits' not in message and '\n' not in message


@pytest.mark.parametrize(
  'content', ['pickled', 'not a zip', 'one array', 'keys']
)
def test_invalid_files_raise(content, flat, tmp_path):
  path = tmp_path / 'bad.npz'
  if content == 'pickled':
    np.savez(path, **{'a//b': np.array([object()])})
  elif content == 'not a zip':
    path.write_bytes(b'not a zip file')
  elif content == 'one array':
    with path.open('wb') as file:
      np.save(file, np.ones(3))
  else:
    np.savez(path, **flat, other=np.ones(3))
  with pytest.raises(ValueError, match='bad.npz: expected') as info:
    alphafold.load_params(path)
  assert 'allow_pickle' not in str(info.value)


def test_unsupported_parameters_are_not_written(tmp_path):
  params = {'a': {'b': jnp.ones(3, jnp.bfloat16)}}
  with pytest.raises(ValueError, match='a//b: expected .* got bfloat16'):
    alphafold.save_params(tmp_path / 'x.npz', params)
  with pytest.raises(ValueError, match='params: expected at least one array'):
    alphafold.save_params(tmp_path / 'x.npz', {})
  assert not list(tmp_path.iterdir())


def test_missing_folder_raises(tmp_path):
  params = {'a': {'b': np.ones(3)}}
  with pytest.raises(FileNotFoundError, match='none: no such folder'):
    alphafold.save_params(tmp_path / 'none' / 'x.npz', params)
