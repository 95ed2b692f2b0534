"""Tests of reading, validating and writing GPT-2 files."""

import json
import pathlib
import shutil

import haiku as hk
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from attention import models
from attention.interop.transformers import load, save

_GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'gpt2'


def _logits(fields, params, tokens):
  fields = {k: v for k, v in fields.items() if k != 'model'}
  model = hk.without_apply_rng(
    hk.transform(
      lambda t: models.create(
        'gpt', **{k: v for k, v in fields.items() if k != 'model'}
      )(t)
    )
  )
  return jax.jit(model.apply)(params, tokens)


@pytest.fixture
def folder(tmp_path):
  shutil.copytree(_GOLDEN, tmp_path, dirs_exist_ok=True)
  return tmp_path


def _change(folder, change):
  arrays = safetensors.load_file(folder / 'model.safetensors')
  change(arrays)
  safetensors.save_file(arrays, folder / 'model.safetensors')


def _configure(folder, **keys):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_logits_match_transformers(
  assert_close,
):
  recorded = np.load(_GOLDEN / 'logits.npz')
  logits = _logits(*load(_GOLDEN), recorded['tokens'])
  assert_close(logits, recorded['logits'])


def test_saving_loaded_weights_preserves_bytes(tmp_path):
  save(tmp_path / 'new', *load(_GOLDEN))
  old, new = (
    safetensors.load_file(f / 'model.safetensors')
    for f in (_GOLDEN, tmp_path / 'new')
  )
  assert old.keys() == new.keys()
  assert all(old[k].tobytes() == new[k].tobytes() for k in old)


@pytest.mark.parametrize('fused_qkv', [True, False])
def test_untied_gpt_round_trips(tmp_path, fused_qkv, assert_close):
  fields = dict(
    vocab_size=11,
    context_size=7,
    num_layers=2,
    num_heads=3,
    model_size=6,
    with_tied_output=False,
    fused_qkv=fused_qkv,
  )
  tokens = np.array([[1, 5, 10]])
  model = hk.transform(
    lambda t: models.create(
      'gpt', **{k: v for k, v in fields.items() if k != 'model'}
    )(t)
  )
  params = model.init(jax.random.key(0), tokens)
  save(tmp_path, fields, params)
  loaded, again = load(tmp_path)
  assert not loaded['with_tied_output']
  expected = _logits(fields, params, tokens)
  assert_close(_logits(loaded, again, tokens), expected)


def test_sharded_files_constants_and_bare_names_are_read(folder):
  _, expected = load(folder)
  arrays = safetensors.load_file(folder / 'model.safetensors')
  bare = {k.removeprefix('transformer.'): a for k, a in arrays.items()}
  bare['h.0.attn.bias'] = np.ones((1, 1, 7, 7), np.float32)
  bare['lm_head.weight'] = bare['wte.weight'].copy()
  (folder / 'model.safetensors').unlink()
  names = sorted(bare)
  for number, part in enumerate((names[::2], names[1::2])):
    safetensors.save_file(
      {k: bare[k] for k in part}, folder / f'part-{number}.safetensors'
    )
  jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)
  path = folder / 'part-0.safetensors'
  again = shutil.copy(path, folder / 'part-2.safetensors')
  with pytest.raises(
    ValueError, match=f': expected once, got {path} and {again}'
  ):
    load(folder)


def test_model_safetensors_takes_precedence(folder):
  _, expected = load(folder)
  for key, array in safetensors.load_file(folder / 'model.safetensors').items():
    safetensors.save_file({key: array + 1}, folder / 'other.safetensors')
  jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)


def test_all_mismatched_arrays_are_listed(folder):
  def change(arrays):
    del arrays['transformer.wpe.weight']
    arrays['transformer.h.7.ln_1.bias'] = np.zeros(3, np.float32)
    arrays['transformer.ln_f.bias'] = np.zeros(5, np.float32)

  _change(folder, change)
  with pytest.raises(ValueError) as error:
    load(folder)
  assert str(error.value) == (
    f'{folder}: missing transformer.wpe.weight; unexpected '
    'transformer.h.7.ln_1.bias; wrong shape: transformer.ln_f.bias expected '
    '(12,), got (5,)'
  )


def test_integer_arrays_raise(folder):
  key = 'transformer.h.1.mlp.c_fc.weight'
  _change(folder, lambda arrays: arrays.update({key: arrays[key].astype('i1')}))
  with pytest.raises(ValueError, match='h.1.mlp.c_fc.weight: .* got I8'):
    load(folder)


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (dict(activation_function='relu'), "'gelu_new' or .*, got 'relu'"),
    (dict(n_inner=13), 'wrong shape: .*expected .12, 13., got .12, 48.'),
    (dict(attn_scaling=2.0), 'attn_scaling: not supported, got 2.0'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by'),
    (dict(n_embd=None), 'config.json: missing n_embd'),
    (dict(n_layer='2'), "n_layer: expected a positive integer, got '2'"),
    (dict(n_head=0), 'n_head: expected a positive integer, got 0'),
    (dict(tie_word_embeddings=1), 'expected true or false, got 1'),
  ],
)
def test_unsupported_config_values_raise(folder, keys, message):
  _configure(folder, **keys)
  with pytest.raises(ValueError, match=message):
    load(folder)


def test_missing_and_damaged_files_raise(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:99])
  with pytest.raises(ValueError, match=f'{path}: not safetensors'):
    load(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'expected \*.safetensors'):
    load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='config.json: not JSON'):
    load(folder)
  (folder / 'config.json').write_text('[1]')
  with pytest.raises(ValueError, match=r'expected an object, got \[1\]'):
    load(folder)
  (folder / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 2}')
  with pytest.raises(ValueError, match='missing n_embd, n_head, n_positions'):
    load(folder)
  (folder / 'config.json').unlink()
  for missing in (folder, folder / 'none'):
    expected = f'{missing}: expected a folder with config.json'
    with pytest.raises(FileNotFoundError, match=expected):
      load(missing)


def test_fields_of_a_config_are_saved_if_they_are_gpt2s(tmp_path):
  fields, params = load(_GOLDEN)
  attention = {'num_kv_heads': 0, 'logit_cap': 0.0, 'implementation': ''}
  save(tmp_path, fields | {'window': 0, 'attention': attention}, params)
  assert load(tmp_path)[0] == fields


def test_invalid_models_are_not_saved(tmp_path):
  fields, params = load(_GOLDEN)
  with pytest.raises(ValueError, match="expected 'attention' .*, got 'lstm'"):
    save(tmp_path, fields | {'mixer': 'lstm'}, params)
  for changes, message in (
    ({'activation': 'relu'}, "activation: expected 'gelu' .*'relu'"),
    ({'window': 3}, 'window: expected None for GPT2LMHeadModel, .*, got 3'),
    ({'attention': {'similarity': 'cosine'}}, 'similarity: .*scaled_dot'),
    ({'attention': {'logit_cap': 9.0}}, 'logit_cap: expected None'),
  ):
    with pytest.raises(ValueError, match=message):
      save(tmp_path, fields | changes, params)
  with pytest.raises(ValueError, match='params: unexpected gpt/block_1/'):
    save(tmp_path, fields | {'num_layers': 1}, params)
  with pytest.raises(ValueError, match='fields: unknown num_layer, width'):
    save(tmp_path, fields | {'width': 12, 'num_layer': 2}, params)
  with pytest.raises(TypeError):
    save(tmp_path, fields | {'dropout_rate': object()}, params)
  del fields['vocab_size']
  with pytest.raises(ValueError, match='fields: missing vocab_size'):
    save(tmp_path, fields, params)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('lost', ['query', 'key', 'value', 'b'])
def test_incomplete_unfused_block_raises(tmp_path, lost):
  fields, params = load(_GOLDEN)
  qkv = params.pop('gpt/block_1/attention/qkv')
  for i, part in enumerate(('query', 'key', 'value')):
    params[f'gpt/block_1/attention/{part}'] = {
      leaf: np.split(array, 3, axis=-1)[i] for leaf, array in qkv.items()
    }
  if lost == 'b':
    del params['gpt/block_1/attention/key']['b']
  else:
    del params[f'gpt/block_1/attention/{lost}']
  with pytest.raises(ValueError, match='missing gpt/block_1/attention/qkv//b'):
    save(tmp_path, fields, params)


def test_numpy_fields_and_additional_fields_are_accepted(tmp_path):
  fields, params = load(_GOLDEN)
  ours = {'implementation': 'chunked', 'use_scan': True, 'fused_qkv': False}
  numbers = {'num_layers': np.int64(2), 'dropout_rate': np.float32(0.25)}
  save(tmp_path, fields | numbers | ours, params)
  assert load(tmp_path)[0] == fields
  config = json.loads((tmp_path / 'config.json').read_text())
  for key in ('attn_pdrop', 'embd_pdrop', 'resid_pdrop'):
    assert config[key] == 0.25


def test_transformers_loads_saved_models(tmp_path, assert_close):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  fields, params = load(_GOLDEN)
  params = jax.tree.map(lambda p: p * 1.5, params)
  save(tmp_path, fields, params)
  network = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
  tokens = np.array([[3, 1, 4, 1, 5]])
  with torch.inference_mode():
    expected = network(torch.from_numpy(tokens)).logits.numpy()
  assert_close(_logits(fields, params, tokens), expected)
