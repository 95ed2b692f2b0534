"""Tests of the attention baselines: parameter counts and causality."""

import haiku as hk
import jax
import numpy as np
import pytest

import attention
from attention import models
from attention.modules.mixers import MIXERS


def _count(make, width):
  model = hk.transform(lambda x: make()(x))
  x = jax.ShapeDtypeStruct((2, 5, width), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize('name', MIXERS)
@pytest.mark.parametrize('width', [32, 64, 128, 768])
def test_parameter_count_matches_attention(name, width):
  expected = _count(lambda: attention.MultiHeadAttention(num_heads=4), width)
  assert expected == 4 * width**2 + 4 * width
  assert abs(_count(MIXERS[name], width) / expected - 1) < 0.02


@pytest.mark.parametrize('name', MIXERS)
def test_mixers_are_causal(name, arrays):
  (x,) = arrays((2, 7, 12))
  model = hk.transform(lambda x: MIXERS[name]()(x))
  params = model.init(jax.random.key(0), x)
  run = jax.jit(lambda x: model.apply(params, None, x))
  changed = np.abs(run(x.at[:, 3].add(1)) - run(x)).max((0, 2)) > 1e-6
  end = {'lstm': 7, 'conv': 6}[name]
  np.testing.assert_array_equal(changed, [3 <= t < end for t in range(7)])


@pytest.mark.parametrize('model', ['gpt', 'classifier'])
def test_models_have_equal_parameter_counts_with_each_mixer(model):
  fields = dict(vocab_size=50, context_size=9, num_layers=2, num_heads=4)
  if model == 'classifier':
    fields['num_classes'] = 3
  counts = {}
  for mixer in ('attention', *MIXERS):
    run = hk.transform(
      lambda x, mixer=mixer: models.create(
        model, model_size=64, mixer=mixer, **fields
      )(x)
    )
    tokens = jax.ShapeDtypeStruct((2, 9), np.int32)
    shapes = jax.eval_shape(run.init, jax.random.key(0), tokens)
    counts[mixer] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert max(counts.values()) / min(counts.values()) < 1.01, counts
