import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention

B, T, M = 3, 5, 12


def _model(**fields):
  return hk.without_apply_rng(
    hk.transform(
      lambda x, context=None: attention.TransformerBlock(num_heads=3, **fields)(
        x, context, mask=attention.Mask.causal()
      )
    )
  )


def test_pre_norm_is_the_formula(arrays, assert_close):
  (x,) = arrays((B, T, M))
  block = _model(norm='pre', activation='relu')
  params = block.init(jax.random.key(0), x)

  def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)

  inner = hk.transform(
    lambda x: attention.MultiHeadAttention(num_heads=3, name='attention')(
      x, mask=attention.Mask.causal()
    )
  )
  own = {
    k.removeprefix('transformer_block/'): v
    for k, v in params.items()
    if '/attention/' in k
  }
  y = x + inner.apply(own, None, norm(x))
  expand = params['transformer_block/expand']
  contract = params['transformer_block/contract']
  hidden = jax.nn.relu(norm(y) @ expand['w'] + expand['b'])
  expected = y + hidden @ contract['w'] + contract['b']
  assert_close(block.apply(params, x), expected, scale=2)


def test_post_norm_ends_normalised(arrays, assert_close):
  (x,) = arrays((B, T, M))
  block = _model(norm='post')
  output = block.apply(block.init(jax.random.key(0), x), x)
  assert np.abs(output.mean(-1)).max() < 1e-5
  assert np.abs(output.std(-1) - 1).max() < 1e-3


@pytest.mark.parametrize('norm', ['pre', 'post'])
def test_no_gradient_comes_from_the_future(arrays, norm):
  (x,) = arrays((B, T, M))
  block = _model(norm=norm)
  params = block.init(jax.random.key(0), x)
  (cotangent,) = arrays((B, 3, M), seed=1)
  grad = jax.grad(lambda x: (block.apply(params, x)[:, :3] * cotangent).sum())
  grad = grad(x)
  assert np.asarray(grad[:, :3]).any()
  assert not np.asarray(grad[:, 3:]).any()


def test_context_reaches_the_output(arrays):
  x, context = arrays((B, T, M), (B, 7, M))
  block = _model()
  params = block.init(jax.random.key(0), x, context)
  grad = jax.grad(lambda c: block.apply(params, x, c).std())(context)
  assert (np.abs(grad) > 0).all()


def test_the_residual_stays_one_array_in_the_compiled_program(arrays):
  """Without it, each kernel of layer n would add up n layers anew."""
  (x,) = arrays((B, T, M))

  def deep(x):
    for _ in range(3):
      x = attention.TransformerBlock(num_heads=3)(x)
    return x

  model = hk.without_apply_rng(hk.transform(deep))
  params = model.init(jax.random.key(0), x)
  text = jax.jit(model.apply).lower(params, x).as_text()
  assert text.count('optimization_barrier') == 6


@pytest.mark.parametrize(
  'layers', [['attn'], ['attention', 'attn'], ['cross_attention'], []]
)
def test_a_cache_of_other_layers_is_refused(arrays, layers):
  (x,) = arrays((B, T, M))
  cache = {layer: attention.Cache.create(T) for layer in layers}
  model = hk.transform(
    lambda x: attention.TransformerBlock(
      num_heads=3, attention={'with_rotary': True}
    )(x, x, cache=cache)
  )
  with pytest.raises(ValueError, match=r'cache: expected .*, got \['):
    model.init(jax.random.key(0), x)


@pytest.mark.parametrize('field', ['norm', 'activation'])
def test_unknown_choices_are_refused(arrays, field):
  (x,) = arrays((B, T, M))
  with pytest.raises(ValueError, match=f"{field}: expected one of .*, got 'x'"):
    _model(**{field: 'x'}).init(jax.random.key(0), x)
