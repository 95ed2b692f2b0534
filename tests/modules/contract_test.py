"""The contract of every module: one list of descriptions drives all checks."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention.modules.layers import LayerNorm, Linear, RMSNorm

B, T, K, M, C = 3, 5, 7, 12, 10

# name: (module, shapes of its inputs, paths of its parameters)
_QKV = {f'{n}/{p}' for n in ('query', 'key', 'value', 'linear') for p in 'wb'}
_GATED = {f'{n}_w' for n in ('query', 'key', 'value', 'gating', 'output')} | {
  'gating_b',
  'output_b',
}
_BLOCK = (
  {f'attention/{path}' for path in _QKV}
  | {
    f'{name}_norm/{p}'
    for name in ('attention', 'feed_forward')
    for p in ('scale', 'offset')
  }
  | {f'{name}/{p}' for name in ('expand', 'contract') for p in 'wb'}
)
_CROSS = (
  _BLOCK
  | {f'cross_attention/{path}' for path in _QKV}
  | {
    'cross_attention_norm/scale',
    'cross_attention_norm/offset',
  }
)
MODULES = {
  'linear': (lambda: Linear(11), [(B, T, M)], {'w', 'b'}),
  'rms_norm': (lambda: RMSNorm(), [(B, T, M)], {'scale'}),
  'layer_norm': (lambda: LayerNorm(), [(B, T, M)], {'scale', 'offset'}),
  'multi_head': (
    lambda: attention.MultiHeadAttention(num_heads=3),
    [(B, T, M)],
    _QKV,
  ),
  'multi_head_cross': (
    lambda: attention.MultiHeadAttention(
      num_heads=6, num_kv_heads=2, key_size=11, value_size=13, model_size=17
    ),
    [(B, T, M), (B, K, C)],
    _QKV,
  ),
  'multi_head_fused': (
    lambda: attention.MultiHeadAttention(
      num_heads=2, fused_qkv=True, with_bias=False, with_output_bias=False
    ),
    [(B, T, M)],
    {'qkv/w', 'linear/w'},
  ),
  'multi_head_rotary_qk_norm': (
    lambda: attention.MultiHeadAttention(
      num_heads=3, with_rotary=True, with_qk_norm=True
    ),
    [(B, T, M)],
    _QKV | {'query_norm/scale', 'key_norm/scale'},
  ),
  'multi_head_part_rotary': (
    lambda: attention.MultiHeadAttention(
      num_heads=3,
      with_rotary=True,
      rotary={'num_channels': 2, 'scaling': 'linear', 'factor': 4},
    ),
    [(B, T, M)],
    _QKV,
  ),
  'multi_head_full_values': (
    lambda: attention.MultiHeadAttention(
      num_heads=4, num_kv_heads=2, value_factorisation='full', model_size=11
    ),
    [(B, T, M), (B, K, C)],
    _QKV - {'linear/w', 'linear/b'},
  ),
  **{
    f'multi_head_{similarity}': (
      lambda similarity=similarity: attention.MultiHeadAttention(
        num_heads=6, num_kv_heads=3, key_size=5, similarity=similarity
      ),
      [(B, T, M), (B, K, C)],
      _QKV | parameters,
    )
    for similarity, parameters in {
      'dot': set(),
      'cosine': set(),
      'general': {'similarity_w'},
      'additive': {'similarity_w'},
    }.items()
  },
  'gated': (
    lambda: attention.GatedAttention(
      num_head=2, output_size=11, zero_init=False
    ),
    [(B, T, M), (B, K, C)],
    _GATED,
  ),
  'gated_wide': (
    lambda: attention.GatedAttention(
      num_head=5, key_size=7, value_size=3, gating=False, zero_init=False
    ),
    [(B, T, M), (B, K, C)],
    _GATED - {'gating_w', 'gating_b'},
  ),
  'global': (
    lambda: attention.GlobalAttention(num_head=2, zero_init=False),
    [(B, T, M), (B, T, C)],
    _GATED,
  ),
  'block_pre': (
    lambda: attention.TransformerBlock(num_heads=3),
    [(B, T, M)],
    _BLOCK,
  ),
  'block_post_cross': (
    lambda: attention.TransformerBlock(
      num_heads=3, norm='post', activation='relu', hidden_size=17
    ),
    [(B, T, M), (B, K, C)],
    _CROSS,
  ),
}


@pytest.fixture(scope='module', params=MODULES)
def built(request, arrays):
  """(model, parameters, inputs, output, paths of the parameters)."""
  make, shapes, paths = MODULES[request.param]
  model = hk.without_apply_rng(hk.transform(lambda *x: make()(*x)))
  inputs = arrays(*shapes)
  params = jax.jit(model.init)(jax.random.key(0), *inputs)
  return model, params, inputs, jax.jit(model.apply)(params, *inputs), paths


def test_parameters_have_their_names(built):
  _, params, _, _, paths = built
  found = {
    '/'.join([*module.split('/')[1:], leaf])
    for module, leaf, _ in hk.data_structures.traverse(params)
  }
  assert found == paths


def test_jit_is_eager(built, assert_close):
  model, params, inputs, expected, _ = built
  assert_close(model.apply(params, *inputs), expected)


def test_vmap_is_the_batch(built, assert_close):
  model, params, inputs, expected, _ = built
  mapped = jax.vmap(model.apply, (None, *(0 for _ in inputs)))
  assert_close(jax.jit(mapped)(params, *inputs), expected)


def test_leading_axes_are_free(built, assert_close):
  model, params, inputs, expected, _ = built
  split = [x.reshape(1, B, 1, *x.shape[1:]) for x in inputs]
  actual = jax.jit(model.apply)(params, *split)
  assert_close(actual.reshape(expected.shape), expected)


def test_bfloat16_in_bfloat16_out_and_near(built, assert_close):
  model, params, inputs, _, _ = built
  inputs = [x.astype(jnp.bfloat16) for x in inputs]
  half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  apply = jax.jit(model.apply)
  actual = apply(half, *inputs)
  assert actual.dtype == jnp.bfloat16
  exact = apply(params, *(x.astype(jnp.float32) for x in inputs))
  assert_close(actual, exact, scale=2)


def test_every_parameter_gets_a_gradient(built, arrays):
  model, params, inputs, output, _ = built
  (cotangent,) = arrays(output.shape, seed=1)
  grads = jax.jit(
    jax.grad(lambda p: (model.apply(p, *inputs) * cotangent).sum())
  )(params)
  for module, leaf, grad in hk.data_structures.traverse(grads):
    assert np.isfinite(grad).all()
    # The same number added to all of a query's logits changes nothing.
    if not (module.endswith('key') and leaf == 'b'):
      assert np.abs(grad).max() > 1e-6, f'{module}/{leaf}'
