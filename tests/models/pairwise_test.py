"""Pairwise models against their formulas."""

import functools

import haiku as hk
import jax
import numpy as np
import pytest

from attention import models

LENGTH, HEADS, SIZE = 7, 3, 4


def _create(kind, **fields):
  fields |= dict(num_heads=HEADS, key_size=SIZE)
  make = functools.partial(
    models.create, 'pairwise', length=LENGTH, kind=kind, **fields
  )
  apply = hk.without_apply_rng(hk.transform(lambda x: make()(x)))
  couplings = hk.without_apply_rng(hk.transform(lambda: make().couplings()))
  rng = np.random.default_rng(0)
  params = jax.eval_shape(
    apply.init, jax.random.key(0), np.zeros((1, LENGTH), int)
  )
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), params
  )
  residues = rng.integers(0, 22, (5, LENGTH))
  logits = jax.jit(apply.apply)(params, residues)
  return params, residues, logits, jax.jit(couplings.apply)(params)


def _sum_couplings(params, couplings, residues):
  (bias,) = (p['bias'] for p in params.values())
  logits = np.broadcast_to(bias, (len(residues), *bias.shape)).copy()
  for n, row in enumerate(residues):
    for j, residue in enumerate(row):
      if residue < 20:
        logits[n] += couplings[j, residue]
  return logits


@pytest.mark.parametrize('kind', ['factored_attention', 'potts'])
def test_logits_sum_the_couplings_to_the_other_residues(kind, assert_close):
  params, residues, logits, couplings = _create(kind)
  couplings = np.asarray(couplings)
  assert_close(logits, _sum_couplings(params, couplings, residues))
  assert_close(couplings, couplings.transpose(2, 3, 0, 1))
  assert not couplings[np.arange(LENGTH), :, np.arange(LENGTH)].any()


def test_factored_attention_is_attention_over_positions(assert_close):
  params, _, _, couplings = _create('factored_attention')
  ((query, key, value),) = (
    (p['query'], p['key'], p['value']) for p in params.values()
  )
  expected = np.zeros((LENGTH, 20, LENGTH, 20))
  for h in range(HEADS):
    weights = np.exp(query[:, h] @ key[:, h].T / np.sqrt(SIZE))
    np.fill_diagonal(weights, 0)
    weights /= weights.sum(1, keepdims=True)
    expected += weights[:, None, :, None] * value[h].T[:, None] / 2
    expected += weights.T[:, None, :, None] * value[h][:, None] / 2
  assert_close(couplings, expected.astype(np.float32))


def test_potts_couplings_are_free(assert_close):
  params, _, _, couplings = _create('potts')
  (free,) = (p['couplings'] for p in params.values())
  expected = (free + free.transpose(2, 3, 0, 1)) / 2
  expected[np.arange(LENGTH), :, np.arange(LENGTH)] = 0
  assert_close(couplings, expected)


def test_unknown_kinds_and_sizes_are_refused():
  with pytest.raises(ValueError, match='model.kind: expected one of'):
    _create('pott')
  with pytest.raises(ValueError, match='no such field; did you mean'):
    _create('potts', num_head=3)
