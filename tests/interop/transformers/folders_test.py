"""Folders of weights: several files, shares of devices, damage, refusals."""

import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from attention import models
from attention.interop import transformers
from attention.interop.transformers.weights import Stored, Weights
from attention.training.parallelism import sharding


@pytest.fixture
def folder(tmp_path, published):
  published.write_folder('gpt_oss', tmp_path)
  return tmp_path


def _assert_equal(tree, expected):
  jax.tree.map(np.testing.assert_array_equal, tree, expected)


def _configure(folder, **keys):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _change(folder, change):
  arrays = safetensors.load_file(folder / 'model.safetensors')
  change(arrays)
  safetensors.save_file(arrays, folder / 'model.safetensors')


def test_large_models_are_written_to_files_of_an_index(folder, tmp_path):
  fields, params = transformers.load(folder)
  new = tmp_path / 'new'
  transformers.save(new, fields, params, max_file_bytes=10**6)
  files = sorted(path.name for path in new.glob('*.safetensors'))
  assert files[0] == f'model-00001-of-{len(files):05d}.safetensors'
  assert all((new / name).stat().st_size < 1.1e6 for name in files)
  index = json.loads((new / 'model.safetensors.index.json').read_text())
  assert sorted({*index['weight_map'].values()}) == files
  _assert_equal(transformers.load(new)[1], params)
  # Weights of before do not stay beside new ones.
  transformers.save(new, fields, params)
  assert [path.name for path in new.glob('*.safetensors*')] == [
    'model.safetensors'
  ]
  assert not list(new.glob('*.part'))
  _assert_equal(transformers.load(new)[1], params)


def test_a_missing_file_of_an_index_is_named(folder, tmp_path):
  new = tmp_path / 'new'
  transformers.save(new, *transformers.load(folder), max_file_bytes=10**6)
  lost = sorted(new.glob('*.safetensors'))[1]
  lost.unlink()
  with pytest.raises(FileNotFoundError, match=f'{lost}: no such file'):
    transformers.load(new)
  (new / 'model.safetensors.index.json').write_text('{}')
  with pytest.raises(ValueError, match="with an object 'weight_map'"):
    transformers.load(new)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept_or_cast(folder, tmp_path, dtype):
  fields, exact = transformers.load(folder)
  _, cast = transformers.load(folder, dtype=dtype)
  _assert_equal(cast, jax.tree.map(lambda x: x.astype(dtype), exact))
  transformers.save(tmp_path / 'new', fields, cast)
  _, again = transformers.load(tmp_path / 'new')
  assert {x.dtype for x in jax.tree.leaves(again)} == {np.dtype(dtype)}
  _assert_equal(again, cast)


def test_devices_read_their_shares_only(folder):
  _, expected = transformers.load(folder)
  if len(jax.devices()) < 2:
    mesh = jax.make_mesh(
      (1, 1, 1),
      ('data', 'fsdp', 'tensor'),
      axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
  else:
    mesh = sharding.make_mesh(2, fsdp=2)
  whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  _, params = transformers.load(folder, sharding=whole)
  _assert_equal(params, expected)

  def shardings(shapes):
    return jax.tree.map(lambda x: x.sharding, sharding.of_state(shapes, mesh))

  _, params = transformers.load(folder, sharding=shardings)
  _assert_equal(params, expected)


def test_parts_of_tensors_are_those_of_the_whole(folder):
  arrays = safetensors.load_file(folder / 'model.safetensors')
  with Weights(folder) as weights:
    for key, stored in {
      'model.layers.3.self_attn.q_proj.weight': Stored('', True),
      'model.embed_tokens.weight': Stored(''),
      'model.layers.0.mlp.experts.gate_up_proj': Stored('', column=1),
      'model.layers.0.mlp.experts.gate_up_proj_bias': Stored('', column=0),
    }.items():
      whole = arrays[key].T if stored.is_transposed else arrays[key]
      if stored.column is not None:
        whole = whole[..., stored.column :: 2]
      index = (*[slice(1, 3)] * (whole.ndim - 1), slice(5, 11))
      where = Stored(key, stored.is_transposed, stored.column)
      np.testing.assert_array_equal(weights.read(where, index), whole[index])
      np.testing.assert_array_equal(weights.read(where), whole)


def test_missing_surplus_and_misshapen_tensors_are_listed(folder):
  def change(arrays):
    del arrays['model.layers.2.self_attn.k_proj.bias']
    arrays['model.layers.9.mlp.router.bias'] = np.zeros(3, np.float32)
    arrays['model.norm.weight'] = np.zeros(7, np.float32)

  _change(folder, change)
  with pytest.raises(ValueError) as error:
    transformers.load(folder)
  assert str(error.value) == (
    f'{folder}: missing model.layers.2.self_attn.k_proj.bias; '
    'unexpected model.layers.9.mlp.router.bias; wrong shape: '
    'model.norm.weight expected (120,), got (7,)'
  )


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (
      {'architectures': ['FalconForCausalLM'], 'model_type': 'falcon'},
      r"architectures: expected one of \['GPT2LMHeadModel', 'LlamaForCaus.*, "
      "got 'FalconForCausalLM'",
    ),
    ({'hidden_act': 'relu'}, "hidden_act: expected 'silu', got 'relu'"),
    ({'hidden_size': None}, 'missing hidden_size'),
    ({'attention_multiplier': 0.5}, 'attention_multiplier: not supported'),
    ({'quantization_config': {'a': 1}}, 'quantization_config: not supported'),
    ({'layer_types': ['chunked'] * 5}, 'layer_types: expected 5 of'),
    (
      {'rope_parameters': {'rope_type': 'longrope'}},
      "rope_type: expected 'default' or .*, got 'longrope'",
    ),
    (
      {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'mscale': 1}},
      'rope_parameters: mscale: not supported, got 1',
    ),
    (
      {'rope_parameters': {'rope_type': 'linear'}},
      'rope_parameters: missing factor',
    ),
    ({'rms_norm_eps': 'x'}, "rms_norm_eps: expected a number, got 'x'"),
  ],
)
def test_what_is_not_computed_is_refused_by_name(folder, keys, message):
  _configure(folder, **keys)
  with pytest.raises(ValueError, match=message):
    transformers.load_fields(folder)
  with pytest.raises(ValueError, match=message):
    transformers.load(folder)


def test_null_caps_of_gemma_are_no_caps(tmp_path, published):
  published.write_folder('gemma2', tmp_path)
  keys = {'attn_logit_softcapping': None, 'final_logit_softcapping': 4.0}
  _configure(tmp_path, **keys)
  fields, params = transformers.load(tmp_path)
  assert 'logit_cap' not in fields['attention']
  assert fields['output_logit_cap'] == 4.0
  transformers.save(tmp_path / 'new', fields, params)
  assert transformers.load_fields(tmp_path / 'new') == fields


def test_a_folder_without_weights_is_refused(folder):
  (folder / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='got none; convert weights'):
    transformers.load(folder)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'norm': 'post'}, "norm: expected 'pre' for .*, got 'post'"),
    (
      {'positions': 'alibi'},
      "positions: expected 'rotary' for .*, got 'alibi'",
    ),
    ({'attention': {'logit_cap': 3.0}}, 'logit_cap: expected None'),
    (
      {'attention': {'rotary': {'num_channels': 4, 'pairs': 'halves'}}},
      'attention.rotary.num_channels: expected None for LlamaForCausalLM',
    ),
    ({'vocab': 3}, 'fields: unknown vocab'),
  ],
)
def test_models_that_no_architecture_computes_are_not_saved(
  tmp_path, changes, message, published
):
  published.write_folder('llama', tmp_path)
  fields, params = transformers.load(tmp_path)
  for key, value in changes.items():
    old = fields.get(key)
    fields[key] = {**old, **value} if isinstance(old, dict) else value
  with pytest.raises(ValueError, match=message):
    transformers.save(tmp_path / 'new', fields, params)
  assert not (tmp_path / 'new').exists()


def test_adjacent_rotary_pairs_are_reordered(tmp_path, assert_close):
  fields = dict(
    vocab_size=11,
    context_size=9,
    num_layers=2,
    num_heads=4,
    model_size=24,
    positions='rotary',
    norm_kind='rms',
    activation='swiglu',
    with_feed_forward_bias=False,
    window=4,
    window_pattern='wf',
    attention=dict(
      num_kv_heads=2,
      with_qk_norm=True,
      with_bias=False,
      with_output_bias=False,
    ),
  )

  def logits(fields, params):
    model = hk.transform(lambda t: models.create('gpt', **fields)(t))
    tokens = np.arange(9)[None] % 11
    if params is None:
      params = jax.jit(model.init)(jax.random.key(0), tokens)
      rng = np.random.RandomState(0)
      params = jax.tree.map(
        lambda x: x + 0.2 * rng.standard_normal(x.shape).astype('f'), params
      )
    return params, jax.jit(model.apply)(params, None, tokens)

  params, expected = logits(fields, None)
  transformers.save(tmp_path, fields, params)
  loaded, again = transformers.load(tmp_path)
  assert loaded.pop('model') == 'gpt'
  assert loaded['attention']['rotary']['pairs'] == 'halves'
  assert_close(logits(loaded, again)[1], expected)


def test_pairs_that_differ_between_layers_are_refused(tmp_path, published):
  published.write_folder('gemma3', tmp_path)
  fields, params = transformers.load(tmp_path)
  fields['window_attention']['rotary']['pairs'] = 'adjacent'
  with pytest.raises(ValueError, match=r'rotary\.pairs: .*got .adjacent'):
    transformers.save(tmp_path / 'new', fields, params)
  assert not (tmp_path / 'new').exists()


def test_fused_projections_are_split(tmp_path, published):
  published.write_folder('qwen2', tmp_path)
  fields, params = transformers.load(tmp_path)
  fused = dict(params)
  for i in range(5):
    stem = f'gpt/block_{i}/attention/'
    parts = [fused.pop(stem + part) for part in ('query', 'key', 'value')]
    fused[f'{stem}qkv'] = {
      leaf: np.concatenate([part[leaf] for part in parts], -1)
      for leaf in ('w', 'b')
    }
  transformers.save(tmp_path / 'new', fields | {'fused_qkv': True}, fused)
  _assert_equal(transformers.load(tmp_path / 'new')[1], params)
