"""Tests of the Evoformer: row blocks, stacks, dtypes, masks and memory."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.modules import evoformer
from attention.ops import mapping

S, N, A, Z = 5, 7, 12, 8
_SMALL = dict(
  num_msa_head=2,
  num_pair_head=4,
  num_outer_channel=3,
  num_intermediate_channel=11,
  num_intermediate_factor=2,
  zero_init=False,
)
_MSA = ((S, N, A), (S, N))
_PAIR = ((N, N, Z), (N, N))
# name: (class, fields, (shape of activations, shape of mask))
LAYERS = {
  'row': (evoformer.MSARowAttentionWithPairBias, {'num_head': 2}, _MSA),
  'column': (evoformer.MSAColumnAttention, {'num_head': 2}, _MSA),
  'global': (evoformer.MSAColumnGlobalAttention, {'num_head': 2}, _MSA),
  'ungated': (
    evoformer.MSAColumnGlobalAttention,
    {'num_head': 2, 'gating': False},
    _MSA,
  ),
  'outer': (
    evoformer.OuterProductMean,
    {'output_size': Z, 'num_outer_channel': 3},
    _MSA,
  ),
  'transition': (evoformer.Transition, {}, _MSA),
  'starting': (evoformer.TriangleAttention, {}, _PAIR),
  'ending': (
    evoformer.TriangleAttention,
    {'orientation': 'per_column'},
    _PAIR,
  ),
  'outgoing': (
    evoformer.TriangleMultiplication,
    {'num_intermediate_channel': 11},
    _PAIR,
  ),
  'incoming': (
    evoformer.TriangleMultiplication,
    {
      'num_intermediate_channel': 11,
      'equation': 'kjc,kic->ijc',
      'fuse_projection_weights': True,
    },
    _PAIR,
  ),
}


def _mask(shape):
  mask = np.random.default_rng(0).random(shape) < 0.7
  mask[0], mask[:, 0] = True, True
  return mask


def _jit(function, **arguments):
  # Optimising would take longer than running the unoptimised program.
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(function, compiler_options=options, **arguments)


def _params(model, *inputs):
  """Random parameters, none of them zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes
  )


def _run(layer, arrays):
  """A layer's output and the gradients of its parameters and activations."""
  kind, fields, (shape, mask_shape) = LAYERS[layer]
  act, pair = arrays(shape, (N, N, Z))
  more = (pair,) if layer == 'row' else ()
  model = hk.transform(
    lambda act, *more: kind(zero_init=False, **fields)(
      act, _mask(mask_shape), *more
    )
  )
  params = _params(model, act, *more)

  def loss(*inputs):
    y = model.apply(inputs[0], None, *inputs[1:])
    return jnp.sin(y).sum(), y

  (_, output), grads = _jit(
    jax.value_and_grad(loss, range(2 + len(more)), has_aux=True)
  )(params, act, *more)
  return output, grads


@pytest.mark.parametrize('layer', LAYERS)
def test_blocks_of_rows_match_all_rows_at_once(
  layer, arrays, assert_close, monkeypatch
):
  expected = jax.tree.leaves(_run(layer, arrays))
  # Two rows a block, and a shorter last one.
  monkeypatch.setattr(mapping, '_POSITIONS', 2 * N)
  actual = jax.tree.leaves(_run(layer, arrays))
  largest = max(float(np.abs(x).max()) for x in expected)
  for one, two in zip(actual, expected, strict=True):
    # Compare on one scale: terms constant over keys have zero gradients, so
    # only rounding remains.
    assert_close(one / largest + 1, two / largest + 1)


def _stack(kind, **fields):
  return hk.transform(lambda *x, **k: kind(**_SMALL, **fields)(*x, **k))


def _inputs(arrays, dtype=jnp.float32):
  return (
    *arrays((S, N, A), (N, N, Z), dtype=dtype),
    _mask((S, N)),
    _mask((N, N)),
  )


@pytest.mark.parametrize('is_extra_msa', [False, True])
def test_stack_equals_sequential_blocks(is_extra_msa, arrays, assert_close):
  inputs = _inputs(arrays)
  fields = dict(is_extra_msa=is_extra_msa, name='block')
  stack = _stack(evoformer.EvoformerStack, num_blocks=2, **fields)
  block = _stack(evoformer.EvoformerBlock, **fields)
  params = _params(stack, *inputs)
  one = jax.eval_shape(block.init, jax.random.key(0), *inputs)
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
    lambda x: (2, *x.shape), one
  )
  act, apply = inputs[:2], _jit(block.apply)
  for i in range(2):
    act = apply(
      jax.tree.map(lambda x, i=i: x[i], params), None, *act, *inputs[2:]
    )
  for actual, expected in zip(
    _jit(stack.apply)(params, None, *inputs), act, strict=True
  ):
    assert_close(actual, expected)


@pytest.mark.slow
def test_blocks_are_initialised_independently(arrays):
  stack = _stack(evoformer.EvoformerStack, num_blocks=2, name='x')
  params = jax.jit(stack.init)(jax.random.key(0), *_inputs(arrays))
  layer = params['x/msa_transition/transition1']['weights']
  assert (layer[0] != layer[1]).any()


def test_program_size_is_independent_of_depth(arrays):
  inputs = _inputs(arrays)

  def length(num_blocks):
    stack = _stack(evoformer.EvoformerStack, num_blocks=num_blocks)
    params = jax.eval_shape(stack.init, jax.random.key(0), *inputs)

    def loss(params):
      return stack.apply(params, None, *inputs)[1].sum()

    return len(jax.jit(jax.grad(loss)).lower(params).as_text().split('\n'))

  assert length(48) == length(2)


def test_bfloat16_matches_float32_and_masked_rows_are_finite(
  arrays, assert_close
):
  msa, pair, msa_mask, pair_mask = _inputs(arrays)
  msa_mask[2], msa_mask[:, 3] = False, False
  pair_mask[3], pair_mask[:, 3] = False, False
  block = _stack(evoformer.EvoformerBlock, outer_first=True)
  params = _params(block, msa, pair)

  def loss(params, msa, pair):
    act = block.apply(params, None, msa, pair, msa_mask, pair_mask)
    return sum((x.astype(jnp.float32) ** 2).mean() for x in act), act

  run = _jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (_, exact), grads = run(params, msa, pair)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, msa, pair))
  (_, rough), half_grads = run(*half)
  for one, two in zip(rough, exact, strict=True):
    assert one.dtype == jnp.bfloat16
    assert_close(one, two)  # 2e-2
  for grad in jax.tree.leaves((grads, half_grads)):
    assert np.isfinite(grad.astype(jnp.float32)).all()


def test_dropout_depends_on_the_key_in_training_only(arrays):
  inputs = _inputs(arrays)
  fields = dict(msa_dropout_rate=0.5, pair_dropout_rate=0.5)
  stack = _stack(evoformer.EvoformerStack, num_blocks=2, **fields)
  params = _params(stack, *inputs)
  apply = _jit(stack.apply, static_argnames='is_training')
  keys = [jax.random.key(i) for i in (1, 1, 2)]
  one, same, other = (
    apply(params, k, *inputs, is_training=True)[1] for k in keys
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()
  still = apply(params, None, *inputs)[1]
  assert (one != still).any()


def _memory(model, num_seq, num_res, is_gradient):
  """MiB of temporary buffers at AlphaFold's widths."""
  act = (
    jax.ShapeDtypeStruct((num_seq, num_res, 256), jnp.float32),
    jax.ShapeDtypeStruct((num_res, num_res, 128), jnp.float32),
  )
  masks = tuple(jax.ShapeDtypeStruct(x.shape[:2], bool) for x in act)
  params = jax.eval_shape(model.init, jax.random.key(0), *act, *masks)

  def forward(params, act, masks):
    return model.apply(params, None, *act, *masks)

  def gradient(params, act, masks, d_act):
    _, vjp = jax.vjp(lambda *x: forward(*x, masks), params, act)
    return vjp(d_act)

  if is_gradient:
    lowered = jax.jit(gradient).lower(params, act, masks, act)
  else:
    lowered = jax.jit(forward).lower(params, act, masks)
  memory = lowered.compile().memory_analysis()
  return memory.temp_size_in_bytes / 2**20


def test_block_memory_is_bounded():
  block = hk.transform(lambda *x: evoformer.EvoformerBlock(zero_init=False)(*x))
  assert _memory(block, 128, 128, is_gradient=False) <= 80
  assert _memory(block, 128, 128, is_gradient=True) <= 240


@pytest.mark.slow
def test_stack_stores_only_block_inputs():
  def memory(num_blocks):
    stack = hk.transform(
      lambda *x: evoformer.EvoformerStack(num_blocks=num_blocks)(*x)
    )
    return _memory(stack, 32, 64, is_gradient=True)

  block = (32 * 64 * 256 + 64 * 64 * 128) * 4 / 2**20
  assert (memory(12) - memory(2)) / 10 <= 1.01 * block


@pytest.mark.parametrize(
  ('act', 'mask', 'message'),
  [
    ((S, N, A), np.ones((S, N), 'f'), 'msa_mask: expected booleans'),
    ((S, N, A), [[1] * N] * S, 'msa_mask: expected booleans'),
    ((S, N, A), [True] * N, 'msa_mask: expected shape'),
    ((S, N, A), np.ones((S,), bool), 'msa_mask: expected shape'),
    ((S, N, A), np.ones((N, S), bool), 'msa_mask: expected shape'),
    ((N, A), np.ones((S, N), bool), 'msa_act: expected'),
    ((S, N, 9), np.ones((S, N), bool), 'num_head: expected a divisor'),
  ],
)
def test_invalid_inputs_raise(act, mask, message):
  block = _stack(evoformer.EvoformerBlock)
  with pytest.raises(ValueError, match=message):
    block.init(
      jax.random.key(0), jnp.ones(act), jnp.ones((N, N, Z)), mask, None
    )


@pytest.mark.parametrize('field', ['msa_dropout_rate', 'pair_dropout_rate'])
def test_dropout_rates_out_of_range_raise(field, arrays):
  block = _stack(evoformer.EvoformerBlock, **{field: 1.5})
  with pytest.raises(ValueError, match=rf'{field}: expected \[0, 1\), got 1.5'):
    block.init(jax.random.key(0), *_inputs(arrays))
  with pytest.raises(ValueError, match='dropout_rate: expected'):
    evoformer.drop_shared(jax.random.key(0), 1.0, 0, jnp.ones((3, 5)))


def test_unknown_orientation_raises():
  model = hk.transform(
    lambda x: evoformer.TriangleAttention(orientation='per_diagonal')(
      x, _mask((N, N))
    )
  )
  with pytest.raises(ValueError, match="orientation: expected 'per_row'"):
    model.init(jax.random.key(0), jnp.ones((N, N, Z)))
