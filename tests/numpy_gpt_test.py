"""Tests that the GPT in NumPy, a reference for others, is the GPT in JAX."""

import haiku as hk
import jax
import numpy as np
import pytest

import attention
from attention import models

B, T, V, M, HEADS, LAYERS = 2, 7, 11, 12, 3, 2
# Not the same in all channels, as norms subtract the mean.
STEP = np.arange(M) / M
TOKENS = np.random.default_rng(1).integers(V, size=(B, T))
SHAPES = {
  'block_input': (B, T, M),
  'query': (B, T, HEADS, M // HEADS),
  'key': (B, T, HEADS, M // HEADS),
  'value': (B, T, HEADS, M // HEADS),
  'pattern': (B, HEADS, T, T),
  'weighted_value': (B, T, HEADS, M // HEADS),
  'head_output': (B, T, HEADS, M),
  'attention_output': (B, T, M),
  'feed_forward_output': (B, T, M),
  'block_output': (B, T, M),
}


def _function(tokens):
  return models.create(
    'gpt',
    vocab_size=V,
    context_size=T + 1,
    num_layers=LAYERS,
    num_heads=HEADS,
    model_size=M,
  )(tokens)


@pytest.fixture(scope='module')
def model():
  """(apply(params), params): all parameters random, of which norms near 1."""
  transformed = hk.transform(_function)
  shapes = jax.eval_shape(transformed.init, jax.random.key(0), TOKENS)
  rng = np.random.default_rng(0)
  params = {
    module: {
      name: np.float32(rng.normal(name == 'scale', 0.5, leaf.shape))
      for name, leaf in leaves.items()
    }
    for module, leaves in shapes.items()
  }
  apply = jax.jit(lambda params: transformed.apply(params, None, TOKENS))
  return apply, params


def _assert_near(actual, expected):
  assert actual.shape == expected.shape
  error = np.abs(np.asarray(actual) - expected).max()
  assert error <= 1e-5 * np.abs(expected).max()


def test_logits_and_patterns_are_those_of_jax(model, numpy_gpt):
  apply, params = model
  found = numpy_gpt(params, TOKENS, num_heads=HEADS)
  assert found['logits'].dtype == np.float64
  _assert_near(apply(params), found['logits'])
  capture = jax.jit(lambda params: attention.capture(_function, params, TOKENS))
  _, patterns = capture(params)
  assert len(patterns) == LAYERS
  for layer in range(LAYERS):
    pattern = patterns[f'gpt/block_{layer}/attention']
    _assert_near(pattern, found['pattern'][layer])


def test_quantities_add_up(model, numpy_gpt):
  _, params = model
  found = numpy_gpt(params, TOKENS, num_heads=HEADS)
  assert found.keys() == {*SHAPES, 'final_stream', 'logits'}
  for name, shape in SHAPES.items():
    assert [x.shape for x in found[name]] == [shape] * LAYERS
  for layer in range(LAYERS):
    of = {name: found[name][layer] for name in SHAPES}
    bias = params[f'gpt/block_{layer}/attention/linear']['b']
    np.testing.assert_allclose(
      of['attention_output'], of['head_output'].sum(2) + bias
    )
    np.testing.assert_allclose(
      of['block_output'],
      of['block_input'] + of['attention_output'] + of['feed_forward_output'],
    )
  np.testing.assert_array_equal(
    found['block_input'][1], found['block_output'][0]
  )
  np.testing.assert_array_equal(found['final_stream'], found['block_output'][1])


def _edited(name, params):
  """An edit of layer 0, and parameters of the same effect on the logits."""
  part = np.arange(3 * M) // M  # of the columns: query, key or value
  is_kept = np.arange(HEADS) != 1
  rows = np.repeat(is_kept, M // HEADS)[:, None]  # of the output projection

  def changed(module, **factors):
    """All parameters, those of a module times a factor, plus a shift."""
    shift = factors.pop('shift', 0)
    new = {k: params[module][k] * x + shift for k, x in factors.items()}
    return {**params, module: {**params[module], **new}}

  def doubled(number):
    factor = np.where(part == number, 2, 1)
    return changed('gpt/block_0/attention/qkv', w=factor, b=factor)

  def projected(**factors):
    return changed('gpt/block_0/attention/linear', **factors)

  def fed(shift):
    return changed('gpt/block_0/contract', b=1, shift=shift)

  return {
    'query': (lambda x: 2 * x, doubled(0)),
    'key': (lambda x: 2 * x, doubled(1)),
    'value': (lambda x: 2 * x, doubled(2)),
    'pattern': (lambda x: x * is_kept[:, None, None], projected(w=rows)),
    'weighted_value': (lambda x: x * is_kept[:, None], projected(w=rows)),
    'head_output': (lambda x: x * is_kept[:, None], projected(w=rows)),
    'attention_output': (lambda x: 0 * x, projected(w=0, b=0)),
    'feed_forward_output': (lambda x: x + STEP, fed(STEP)),
    'block_input': (
      lambda x: x + STEP,
      changed('gpt', positions=1, shift=STEP),
    ),
    'block_output': (lambda x: x - STEP, fed(-STEP)),
  }[name]


@pytest.mark.parametrize('name', SHAPES)
def test_edits_are_changes_of_parameters(name, model, numpy_gpt):
  apply, params = model
  edit, changed = _edited(name, params)
  found = numpy_gpt(params, TOKENS, num_heads=HEADS, edits={(0, name): edit})
  plain = numpy_gpt(params, TOKENS, num_heads=HEADS)
  np.testing.assert_array_equal(found[name][0], edit(plain[name][0]))
  _assert_near(apply(changed), found['logits'])
  # It is no small effect.
  assert np.abs(found['logits'] - plain['logits']).max() > 0.05


def test_edits_of_later_layers_and_of_the_end(model, numpy_gpt):
  _, params = model
  plain = numpy_gpt(params, TOKENS, num_heads=HEADS)
  edits = {(1, 'block_input'): lambda x: 0 * x, (None, 'logits'): np.negative}
  found = numpy_gpt(params, TOKENS, num_heads=HEADS, edits=edits)
  np.testing.assert_array_equal(
    found['block_output'][0], plain['block_output'][0]
  )
  assert not found['block_input'][1].any()
  # A stream of zeros is the same at all positions, whatever the tokens.
  logits = found['logits']
  np.testing.assert_allclose(logits, np.broadcast_to(logits[:1, :1], (B, T, V)))
  alone = {(None, 'final_stream'): lambda x: plain['final_stream'][:, ::-1]}
  flipped = numpy_gpt(params, TOKENS, num_heads=HEADS, edits=alone)
  np.testing.assert_allclose(flipped['logits'], plain['logits'][:, ::-1])


def test_edits_of_nothing_are_refused(model, numpy_gpt):
  _, params = model
  for place in ((0, 'querry'), (LAYERS, 'query'), (0, 'logits')):
    with pytest.raises(ValueError, match='edits: expected known places'):
      numpy_gpt(params, TOKENS, num_heads=HEADS, edits={place: np.negative})
  with pytest.raises(ValueError, match='edits: expected shape'):
    numpy_gpt(
      params, TOKENS, num_heads=HEADS, edits={(0, 'key'): lambda x: x[0]}
    )
