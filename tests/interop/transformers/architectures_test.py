"""Every architecture against what transformers computes, live or recorded."""

import json
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from attention import decoding, models
from attention.interop import transformers
from attention.interop.transformers.normal_form import compare, normal_form
from attention.models.losses import cross_entropy
from attention.ops.cache import Cache

_GOLDEN = pathlib.Path(__file__).parents[2] / 'golden' / 'transformers'
_NAMES = sorted(path.stem for path in _GOLDEN.glob('*.npz'))


def _model(fields):
  fields = dict(fields)
  kind = fields.pop('model')
  return hk.without_apply_rng(
    hk.transform(
      lambda tokens, **more: models.create(kind, **fields)(tokens, **more)
    )
  )


@pytest.mark.parametrize('name', _NAMES)
def test_logits_and_gradients_are_those_of_transformers(
  name, tmp_path, published
):
  recorded = published.write_folder(name, tmp_path)
  fields, params = transformers.load(tmp_path)
  model, tokens = _model(fields), jnp.asarray(recorded['tokens'])

  @jax.jit
  def run(params):
    def loss(params):
      logits = model.apply(params, tokens)
      total, count = cross_entropy(logits[:, :-1], tokens[:, 1:])
      return total / count, logits

    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), gradients = run(params)
  expected = recorded['logits']
  error = np.abs(np.asarray(logits)[:, [0, 6, 7, 8, 15, 22]] - expected).max()
  assert error < 1e-5 * np.abs(expected).max()
  assert abs(loss - recorded['loss']) < 1e-5
  # Files of gradients, in the tensors of transformers.
  transformers.save(tmp_path / 'gradients', fields, gradients)
  found = safetensors.load_file(tmp_path / 'gradients' / 'model.safetensors')
  weights = safetensors.load_file(tmp_path / 'model.safetensors')
  expected = json.loads(str(recorded['gradients']))
  assert found.keys() == expected.keys()
  for key, (norm, product) in expected.items():
    got = np.linalg.norm(found[key])
    assert abs(got - norm) < 1e-3 * norm + 1e-6, key
    got = (found[key].astype(np.float64) * weights[key]).sum()
    size = norm * np.linalg.norm(weights[key])
    assert abs(got - product) < 1e-3 * size + 1e-6, key


@pytest.mark.parametrize('name', _NAMES)
def test_greedy_tokens_after_padded_prompts_are_those_of_transformers(
  name, tmp_path, published
):
  recorded = published.write_folder(name, tmp_path)
  fields, params = transformers.load(tmp_path)
  model = _model(fields)

  @jax.jit
  def generate(params, prompts):
    def step(tokens, cache):
      logits, cache = model.apply(params, tokens, cache=cache)
      return logits[:, -1], cache

    cache = Cache.create(9 + 29, start=np.array([0, 4]))
    return decoding.greedy(step, cache, prompts, 30)

  got = generate(params, recorded['prompts'])
  np.testing.assert_array_equal(got, recorded['generated'])


@pytest.mark.parametrize('name', _NAMES)
def test_saved_models_have_the_same_bytes(name, tmp_path, published):
  published.write_folder(name, tmp_path / 'old')
  fields, params = transformers.load(tmp_path / 'old')
  transformers.save(tmp_path / 'new', fields, params)
  again = transformers.load_fields(tmp_path / 'new')
  del fields['model'], again['model']
  assert not compare(normal_form(fields), normal_form(again))
  old, new = (
    safetensors.load_file(tmp_path / folder / 'model.safetensors')
    for folder in ('old', 'new')
  )
  assert old.keys() == new.keys()
  assert all(old[key].tobytes() == new[key].tobytes() for key in old)
  before, after = (
    json.loads((tmp_path / folder / 'config.json').read_text())
    for folder in ('old', 'new')
  )
  assert before['architectures'] == after['architectures']


@pytest.mark.parametrize('name', _NAMES)
def test_transformers_reads_what_is_saved(name, tmp_path, published):
  theirs = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  recorded = published.write_folder(name, tmp_path)
  transformers.save(tmp_path / 'new', *transformers.load(tmp_path))
  network = theirs.AutoModelForCausalLM.from_pretrained(
    tmp_path / 'new', attn_implementation='eager'
  )
  weights = published.weights(json.loads(str(recorded['shapes'])))
  state = dict(network.named_parameters())
  assert state.keys() == weights.keys()
  for key, array in weights.items():
    np.testing.assert_array_equal(state[key].detach().numpy(), array)
  with torch.inference_mode():
    logits = network.eval()(torch.from_numpy(recorded['tokens'])).logits
  logits = logits[:, [0, 6, 7, 8, 15, 22]].numpy()
  error = np.abs(logits - recorded['logits']).max()
  assert error < 1e-5 * np.abs(recorded['logits']).max()
