"""Capture, edits and sweeps of functions with stacks, loops, repeated calls."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Edit, analysis
from attention.modules.evoformer import EvoformerStack

B, T, M, H = 2, 7, 12, 3
STACK = '__layer_stack_no_per_layer/block/attention'


def _mixed(x):
  """A module called twice, a stack, rematerialisation, Haiku's attention."""
  twice = attention.MultiHeadAttention(num_heads=H, name='twice')
  x = twice(twice(x), mask=attention.Mask.causal())
  x = hk.layer_stack(3)(attention.TransformerBlock(num_heads=2, name='block'))(
    x
  )
  x = hk.remat(attention.MultiHeadAttention(num_heads=H, name='attention'))(x)
  mask = jnp.tril(jnp.ones((T, T)))[None, None]
  init = hk.initializers.VarianceScaling()
  haiku = hk.MultiHeadAttention(H, 4, w_init=init, name='haiku')
  return haiku(x, x, x, mask)


@pytest.fixture(scope='module')
def mixed(random_params):
  x = jax.random.normal(jax.random.key(0), (B, T, M))
  return random_params(_mixed, x), x


def _without_head(params, linear, head, num_heads, layer=()):
  """Parameters whose output projection ignores a head."""
  w = np.array(params[linear]['w'])
  rows = w[layer].reshape(num_heads, -1, w.shape[-1])
  rows[head] = 0
  return params | {linear: params[linear] | {'w': jnp.asarray(w)}}


def test_edits_reach_stacks_and_repeated_calls(mixed, assert_near):
  params, x = mixed
  model = hk.transform(_mixed)

  def ablate(params, path, kind, head=1):
    return attention.edit(_mixed, params, {path: Edit(kind, heads=[head])}, x)

  cases = {
    f'{STACK}[1]': (STACK, 2, (1,)),
    'attention': ('attention', H, ()),
    'haiku': ('haiku', H, ()),
  }
  kinds = 'weighted_value', 'pattern', 'head_output'
  run = jax.jit(
    lambda p: {
      (path, kind): ablate(p, path, kind) for path in cases for kind in kinds
    }
  )
  apply = jax.jit(lambda p: model.apply(p, None, x))
  for (path, _), output in run(params).items():
    module, num_heads, layer = cases[path]
    without = _without_head(params, f'{module}/linear', 1, num_heads, layer)
    assert_near(output, apply(without), 2e-5 * np.abs(output).max())


def test_calls_of_one_module_are_edited_apart(
  arrays, random_params, assert_near
):
  (x,) = arrays((B, T, M))

  def function(x):
    twice = attention.MultiHeadAttention(num_heads=H, name='twice')
    return twice(twice(x))

  def once(x):
    return attention.MultiHeadAttention(num_heads=H, name='twice')(x)

  params = random_params(function, x)

  @jax.jit
  def run(params):
    change = Edit('value', lambda v: 2 * v)
    edited = {
      path: attention.edit(function, params, {path: change}, x)
      for path in ('twice', 'twice#1')
    }
    plain = functools.partial(attention.edit, once, params)
    return edited, {
      'twice': plain({}, plain({'twice': change}, x)),
      'twice#1': plain({'twice': change}, plain({}, x)),
    }

  edited, expected = run(params)
  assert_near(edited, expected, 1e-5)


def test_values_by_layer_replace_those_of_a_stack(mixed, assert_near):
  params, x = mixed
  _, patterns = attention.capture(_mixed, params, x, layers=STACK)
  new = patterns[STACK][:, ::-1]

  @jax.jit
  def run(params):
    whole = {STACK: Edit('pattern', new)}
    each = {f'{STACK}[{i}]': Edit('pattern', new[i]) for i in range(3)}
    return [attention.edit(_mixed, params, e, x) for e in (whole, each)]

  whole, each = run(params)
  assert_near(whole, each, 1e-5 * np.abs(whole).max())


def test_blocks_of_an_evoformer_are_edited(arrays, random_params, assert_near):
  # More rows than its layers process at a time.
  msa, pair = arrays((53, 41, 6), (41, 41, 4))

  def function(msa, pair):
    return EvoformerStack(
      num_blocks=3, num_msa_head=3, num_pair_head=2, name='stack'
    )(msa, pair)

  params = random_params(function, msa, pair)
  modules = {
    'stack/msa_row_attention_with_pair_bias/attention': 3,
    'stack/triangle_attention_ending_node/attention': 2,
  }

  @jax.jit
  def run(params):
    return {
      path: attention.edit(
        function, params, {f'{path}[1]': Edit('pattern', heads=[1])}, msa, pair
      )
      for path in modules
    }

  model = hk.transform(function)
  apply = jax.jit(lambda p: model.apply(p, None, msa, pair))
  for path, output in run(params).items():
    w = params[path]['output_w'].at[1, 1].set(0)
    without = params | {path: params[path] | {'output_w': w}}
    assert_near(output, apply(without), 1e-4)

  _, streams = jax.jit(
    lambda p: attention.capture(
      function,
      p,
      msa,
      pair,
      what=('block_input', 'block_output'),
      edits={'stack/pair[1]': Edit('block_output', 0.0)},
    )
  )(params)
  before, after = streams['block_input'], streams['block_output']
  assert not after['stack/pair'][1].any()
  np.testing.assert_array_equal(before['stack/pair'][2], after['stack/pair'][1])
  np.testing.assert_array_equal(before['stack/msa'][1:], after['stack/msa'][:2])


class _Stack(hk.Module):
  """As AlphaFold's: a loop that carries state, over stacked parameters."""

  def __init__(self, function, count):
    super().__init__(name='stack')
    self._call_wrapped, self._count = function, count

  def __call__(self, x):
    if hk.running_init():

      def create(create, shape, dtype, init, _):
        return create((self._count, *shape), dtype, init)

      with hk.experimental.custom_creator(create), self._layer(0):
        return self._call_wrapped(x)

    def step(x, layer):
      with self._layer(layer):
        return self._call_wrapped(x), None

    return hk.scan(step, x, jnp.arange(self._count))[0]

  @hk.transparent
  def _layer(self, layer):
    return hk.experimental.custom_getter(
      lambda get, value, _: get(jnp.asarray(value)[layer])
    )


def _recycled(x):
  block = attention.GatedAttention(
    num_head=H, zero_init=False, name='attention'
  )
  stack = _Stack(hk.remat(lambda x: x + block(x, x)), 3)
  if hk.running_init():
    x = stack(x)
  else:
    _, x = hk.while_loop(
      lambda carry: carry[0] < 2, lambda c: (c[0] + 1, stack(c[1])), (0, x)
    )
  return stack(x)


def test_alphafolds_stack_and_recycling_are_captured_and_edited(
  arrays, random_params, assert_near
):
  (x,) = arrays((B, T, M))
  model = hk.transform(_recycled)
  params = random_params(_recycled, x)
  output, patterns = jax.jit(lambda p: attention.capture(_recycled, p, x))(
    params
  )
  assert_near(output, jax.jit(lambda p: model.apply(p, None, x))(params), 1e-5)
  (path, last) = patterns
  assert last == f'{path}#1'
  assert patterns[path].shape == (3, B, H, T, T)

  # Layer by layer, the loop's last iteration and the call after it.
  def layer(x, leaves):
    def one(x):
      module = attention.GatedAttention(num_head=H, name='attention')
      return x + module(x, x)

    return attention.capture(one, {'attention': leaves}, x)

  def stack(x, edited=None):
    seen = []
    for i in range(3):
      leaves = jax.tree.map(lambda p, i=i: p[i], params[path])
      if i == edited:
        leaves['output_w'] = leaves['output_w'].at[1].set(0)
      after, pattern = layer(x, leaves)
      seen.append(pattern['attention'])
      x = x + (after - x)
    return x, np.stack(seen)

  y, _ = stack(x)
  y, in_loop = stack(y)
  z, after = stack(y)
  assert_near([patterns[path], patterns[last]], [in_loop, after], 1e-5)
  assert_near(output, z, 1e-4)
  edited = jax.jit(
    lambda p: attention.edit(
      _recycled, p, {f'{last}[1]': Edit('pattern', heads=[1])}, x
    )
  )(params)
  assert_near(edited, stack(y, edited=1)[0], 1e-4)


def test_layers_that_are_not_edited_keep_their_implementation(
  arrays, random_params
):
  (x,) = arrays((1, 256, 8))

  def function(x):
    return hk.layer_stack(2)(
      attention.TransformerBlock(
        num_heads=2, attention={'implementation': 'chunked'}, name='block'
      )
    )(
      attention.MultiHeadAttention(
        num_heads=2, implementation='chunked', name='first'
      )(x)
    )

  params = random_params(function, x)

  def count(edits):
    jaxpr = jax.make_jaxpr(lambda p: attention.edit(function, p, edits, x))(
      params
    )
    return str(jaxpr).count('f32[1,2,256,256]')

  assert count({}) == count({'first': Edit('value', heads=[0])}) == 0
  assert count({'first': Edit('pattern', heads=[0])}) > 0
  # In a stack, only layers that are edited take the branch with a pattern.
  stacked = jax.make_jaxpr(
    lambda p: attention.edit(
      function, p, {f'{STACK}[1]': Edit('pattern', heads=[0])}, x
    )
  )(params)
  assert 'cond[' in str(stacked)


def test_a_function_with_state_returns_it(arrays):
  (x,) = arrays((B, T, M))

  def function(x):
    hk.set_state('calls', hk.get_state('calls', (), init=jnp.zeros) + 1)
    return attention.MultiHeadAttention(num_heads=H, name='attention')(x)

  model = hk.transform_with_state(function)
  params, state = model.init(jax.random.key(0), x)
  edits = {'attention': Edit('value', heads=[0])}
  output, after = attention.edit(model, params, edits, x, state=state)
  _, expected = model.apply(params, state, None, x)
  assert jax.tree.map(float, after) == jax.tree.map(float, expected)
  assert output.shape == x.shape


def test_bfloat16_stays(arrays, assert_near):
  (x,) = arrays((B, T, M), dtype=jnp.bfloat16)

  def function(x):
    return attention.MultiHeadAttention(num_heads=H, name='attention')(x)

  params = jax.jit(hk.transform(function).init)(jax.random.key(0), x)
  _, values = attention.capture(
    function, params, x, what=('pattern', 'query', 'head_output')
  )
  dtypes = [v['attention'].dtype for v in values.values()]
  assert dtypes == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
  edits = {'attention': Edit('pattern', values['pattern']['attention'])}
  edited = attention.edit(function, params, edits, x)
  assert edited.dtype == jnp.bfloat16
  plain = hk.transform(function).apply(params, None, x)
  assert_near(edited.astype('float32'), plain.astype('float32'), 2e-2)


@pytest.mark.parametrize(
  'path, edit, message',
  [
    (
      'twise',
      Edit('query'),
      r"edits: .* 0: twice, 1: twice#1, .*, got 'twise'",
    ),
    ('twice', Edit('queries'), r"what: expected one of query, .* 'queries'"),
    ('twice', Edit('query', heads=3), r'heads: expected 0 to 2, got \[3\]'),
    ('twice', Edit('key', positions=[7]), r'positions: expected 0 to 6, got'),
    ('twice', Edit('key', heads=[True]), r'heads: expected 3 booleans, got'),
    ('twice', Edit('key', jnp.ones(5)), r'new: expected a key that broadca.*5'),
    ('twice', Edit('gate'), r"at least one gated attention call for 'gate'"),
    (f'{STACK}[3]', Edit('key'), r"edits: .*block/attention\[2\].*, got '__"),
    (STACK, Edit('key', jnp.ones((2, B, T, 2, 6))), r'or by layer \(3, 2, 7'),
    ('twice', Edit('pattern', lambda x: x[0, 0, 1:]), r'got shape \(6, 7\)'),
    (
      STACK.removesuffix('/attention'),
      Edit('block_output', heads=[0]),
      r"heads: expected None for 'block_output', which has no heads",
    ),
  ],
)
def test_what_is_not_there_raises(mixed, path, edit, message):
  params, x = mixed
  with pytest.raises(ValueError, match=message) as error:
    attention.edit(_mixed, params, {path: edit}, x)
  assert '\n' not in str(error.value)


def test_a_sweep_goes_through_the_layers_of_a_stack(mixed, assert_near):
  params, x = mixed
  swept = jax.jit(
    lambda p: analysis.sweep(
      _mixed, p, Edit('weighted_value'), x, layers=[STACK]
    )
  )(params)
  assert swept.shape == (3, 2, B, T, M)
  single = attention.edit(
    _mixed, params, {f'{STACK}[2]': Edit('weighted_value', heads=[1])}, x
  )
  assert_near(swept[2, 1], single, 1e-5 * np.abs(single).max())


def test_impossible_sweeps_raise(mixed):
  params, x = mixed
  for change, fields, message in (
    (Edit('key', heads=[0]), {}, 'change: expected heads=None'),
    (Edit('key'), {}, 'layers: expected as many heads in all layers'),
    (Edit('key'), {'over': 'layers'}, "over: expected one of .*'heads'"),
    (Edit('block_output'), {}, "over: expected positions for 'block_output'"),
    (Edit('key', {}), {'layers': 'twice'}, 'expected new to have the paths'),
  ):
    with pytest.raises(ValueError, match=message):
      analysis.sweep(_mixed, params, change, x, **fields)


def test_haikus_loops_over_modules_are_captured(arrays):
  (x,) = arrays((B, T, M))

  def function(x):
    module = attention.MultiHeadAttention(num_heads=H, name='attention')

    def step(x, _):
      return module(module(x)), None

    x, _ = hk.scan(step, x, None, length=3)
    core = hk.LSTM(M)
    return hk.dynamic_unroll(core, x, core.initial_state(B), False)[0]

  params = jax.jit(hk.transform(function).init)(jax.random.key(0), x)
  _, values = attention.capture(function, params, x, what=('pattern', 'output'))
  # Of the last iteration.
  assert list(values['pattern']) == ['attention', 'attention#1']
  for pattern in values['pattern'].values():
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
  assert np.isfinite(values['output']['lstm/linear']).all()
