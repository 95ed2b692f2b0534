"""The Evoformer with its embeddings and heads."""

import json
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import models
from attention.data import masking
from attention.data.alignments import Alignment
from attention.data.masking import Sampler
from attention.models import msa
from attention.training.optimization import precision

_NAMES = pathlib.Path(__file__).parent.parent / 'golden/names_model_1.json'
_TRUNK = 'alphafold/alphafold_iteration/evoformer/'
S, E, L = 3, 2, 7
_EVOFORMER = dict(
  num_msa_head=2,
  num_pair_head=2,
  num_outer_channel=3,
  num_intermediate_channel=5,
  num_intermediate_factor=2,
)
_SIZES = dict(
  msa_size=6, pair_size=4, extra_msa_size=8, num_blocks=2, num_extra_blocks=1
)


def _sample(num_seq=S, num_extra=E, num_res=L, size=(S + E, L)):
  rng = np.random.default_rng(0)
  residues = rng.integers(0, 21, size).astype(np.int8)
  deletions = rng.integers(0, 3, size)
  sampler = Sampler(num_seq=num_seq, num_extra=num_extra, num_res=num_res)
  return sampler.sample(Alignment('x', residues, deletions), rng)


def _model(evoformer=None, **fields):
  fields = _SIZES | fields
  fields['evoformer'] = _EVOFORMER | (evoformer or {})
  return hk.transform(
    lambda sample, **more: models.create('msa', **fields)(
      msa.make_features(sample), **more
    )
  )


def _params(model, sample, seed=0):
  """Parameters far from where they start."""
  shapes = jax.eval_shape(model.init, jax.random.key(seed), sample)
  leaves, tree = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return tree.unflatten(
    0.3 * jax.random.normal(k, x.shape)
    for k, x in zip(keys, leaves, strict=True)
  )


def _apply(model, params, sample):
  return jax.jit(model.apply)(params, None, sample)


def test_logits_have_the_shapes_of_the_alignment_and_its_pairs():
  model, sample = _model(), _sample()
  logits = _apply(model, _params(model, sample), sample)
  assert logits['msa'].shape == (S, L, 23)
  assert logits['distances'].shape == (L, L, 64)
  np.testing.assert_allclose(
    logits['distances'], logits['distances'].swapaxes(0, 1), rtol=1e-6
  )
  near = msa.contact_probabilities(logits['distances'])
  assert ((near > 0) & (near < 1)).all()


def test_the_model_and_its_samples_have_the_same_classes():
  assert msa.NUM_CLASSES == masking.NUM_CLASSES


def test_contacts_are_bins_that_end_below_eight_angstrom():
  logits = np.full((1, 1, 64), -40.0)
  for distance, expected in ((7.9, 1), (8.3, 0), (2.0, 1), (30.0, 0)):
    here = logits.copy()
    here[..., np.searchsorted(msa.BREAKS, distance)] = 0
    near = float(msa.contact_probabilities(here)[0, 0])
    assert near == pytest.approx(expected, abs=1e-6)


def test_padding_never_changes_an_output():
  sample = _sample()
  padded = _sample(S + 2, E + 3, L + 4)
  for name, x in sample.items():
    # Both samplers draw other masks and orders of rows: copy the content.
    where = tuple(slice(n) for n in x.shape)
    padded[name] = padded[name].copy()
    padded[name][where] = x
  rng = np.random.default_rng(1)
  for name in ('msa', 'extra_msa', 'query'):
    is_padding = np.ones(padded[name].shape, bool)
    is_padding[tuple(slice(n) for n in sample[name].shape)] = False
    padded[name][is_padding] = rng.integers(0, 20, is_padding.sum())
  for name, shape in (('msa_mask', (S, L)), ('extra_mask', (E, L))):
    padded[name] = np.pad(
      np.ones(shape, bool),
      [(0, b - a) for a, b in zip(shape, padded[name].shape, strict=True)],
    )
  padded['res_mask'] = np.arange(L + 4) < L
  model = _model()
  params = _params(model, sample)
  expected, got = (_apply(model, params, x) for x in (sample, padded))
  np.testing.assert_allclose(
    got['msa'][:S, :L], expected['msa'], rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    got['distances'][:L, :L], expected['distances'], rtol=1e-4, atol=1e-4
  )


def test_each_input_reaches_both_outputs():
  model, sample = _model(), _sample()
  params = _params(model, sample)
  logits = _apply(model, params, sample)
  for name, change in (
    ('msa', lambda x: (x + 1) % 20),
    ('query', lambda x: (x + 1) % 20),
    ('extra_msa', lambda x: (x + 1) % 20),
    ('profile', lambda x: x[::-1]),
    ('deletions', lambda x: x + 1),
    ('extra_deletions', lambda x: x + 1),
    ('mean_deletions', lambda x: x + 1),
    ('residue_index', lambda x: x * 2),
  ):
    changed = _apply(model, params, sample | {name: change(sample[name])})
    for kind in logits:
      assert (changed[kind] != logits[kind]).any(), (name, kind)


@pytest.mark.parametrize(
  ('change', 'missing'),
  [
    ({'gating': False}, 'gating_w'),
    ({'with_pair_bias': False}, 'feat_2d_weights'),
    ({'with_triangles': False}, 'triangle'),
  ],
  ids=['gate', 'pair_bias', 'triangles'],
)
def test_parts_can_be_taken_out(change, missing):
  sample = _sample()

  def names(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), sample)
    return {
      f'{scope}//{name}'
      for scope, name, _ in hk.data_structures.traverse(shapes)
    }

  whole, part = names(_model()), names(_model(change))
  assert part < whole
  # Triangle attention has a pair bias and gates of its own.
  gone = whole - part
  assert gone and all(
    missing in name or name.startswith('msa/') for name in gone
  )
  assert any(missing in name for name in gone)
  row = 'msa/evoformer_iteration/msa_row_attention_with_pair_bias'
  if 'with_pair_bias' in change:
    kept = {n for n in part if 'feat_2d_weights' in n}
    assert kept and not any(n.startswith(row) for n in kept)
  else:
    assert not any(missing in name for name in part)
  model = _model(change)
  logits = _apply(model, _params(model, sample), sample)
  assert all(np.isfinite(x).all() for x in logits.values())


def test_parameters_of_alphafolds_sizes_are_alphafolds():
  published = json.loads(_NAMES.read_text())
  model = hk.transform(
    lambda sample: models.create('msa')(msa.make_features(sample))
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), _sample())
  found = {
    f'{scope.removeprefix("msa/")}//{name}': list(leaf.shape)
    for scope, name, leaf in hk.data_structures.traverse(shapes)
    if name != 'first_row'
  }
  for name, shape in found.items():
    is_head = name.startswith(('masked_msa_head', 'distogram_head'))
    prefix = _TRUNK.removesuffix('evoformer/') if is_head else _TRUNK
    assert published[prefix + name] == shape
  stacks = '/evoformer_iteration/', '/extra_msa_stack/'
  expected = {
    name.removeprefix(_TRUNK)
    for name in published
    if any(stack in name for stack in stacks)
  }
  assert expected <= found.keys() and len(expected) > 100


def test_bfloat16_compute_gives_float32_logits_near_those_of_float32():
  model, sample = _model(), _sample()
  params = jax.tree.map(lambda x: 0.3 * x, _params(model, sample))
  expected = _apply(model, params, sample)
  with precision.applied('params=float32,compute=bfloat16,output=float32'):
    # New functions, as JAX would reuse the trace of the other policy.
    text = str(jax.make_jaxpr(lambda *x: model.apply(*x))(params, None, sample))
    got = jax.jit(lambda *x: model.apply(*x))(params, None, sample)
  assert 'bf16[3,7,6]' in text
  for kind, x in got.items():
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected[kind], atol=0.05)


def test_products_alone_in_bfloat16_stay_near_float32():
  model, sample = _model(), _sample()
  params = jax.tree.map(lambda x: 0.3 * x, _params(model, sample))

  def loss(params):
    kinds = model.apply(params, None, sample)
    return sum(jnp.square(x).mean() for x in kinds.values())

  expected = jax.jit(jax.value_and_grad(loss))(params)
  with precision.applied('products=bfloat16'):
    grad = jax.value_and_grad(lambda p: loss(p))
    text = str(jax.make_jaxpr(grad)(params))
    got = jax.jit(grad)(params)
  assert 'bf16[6,6]' in text  # the heads of a projection, flattened
  assert got[0] != expected[0]
  for (path, x), y in zip(
    jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, y, atol=0.05, err_msg=str(path))


def test_mistakes_in_fields_are_refused():
  sample = _sample()
  for model, message in (
    (_model({'num_blocks': 3}), 'model.evoformer.num_blocks: .* no such field'),
    (_model({'gatin': True}), "gatin: .* no such field.*'gating'"),
    (_model(pair_size=0), 'model.pair_size: expected 1 or more, got 0'),
    (_model(msa_size=7), 'num_head: expected a divisor of the width 7'),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(model.init, jax.random.key(0), sample)
