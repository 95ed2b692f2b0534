"""Tests of what capture reads and edit changes, and of sweeps."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Edit, analysis, models
from attention.modules.evoformer import EvoformerStack
from attention.ops import products

B, T, M, H = 2, 7, 12, 3
KINDS = (
  'query',
  'key',
  'value',
  'pattern',
  'weighted_value',
  'head_output',
  'block_input',
  'block_output',
)
STACK = '__layer_stack_no_per_layer/block/attention'


def _gpt(tokens, **fields):
  return models.create(
    'gpt',
    vocab_size=11,
    context_size=T,
    num_layers=2,
    num_heads=H,
    model_size=M,
    **fields,
  )(tokens)


def _random(params, scale=0.3):
  """Parameters of which none is 0 or 1."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + scale * rng.normal(size=x.shape).astype(np.float32), params
  )


def _init(function, *inputs):
  model = hk.transform(function)
  return _random(jax.jit(model.init)(jax.random.key(0), *inputs))


def _close(actual, expected, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
    actual,
    expected,
  )


def _path(kind, layer):
  return f'gpt/block_{layer}' + ('' if 'block' in kind else '/attention')


@pytest.fixture(scope='module')
def gpt():
  """(params, tokens, other tokens)."""
  tokens = np.random.default_rng(1).integers(0, 11, (2, B, T))
  first, second = jnp.asarray(tokens)
  return _init(_gpt, first), first, second


@pytest.fixture(scope='module')
def captured(gpt):
  """{tokens' number: values by kind and path} of both inputs."""
  params, *inputs = gpt
  run = jax.jit(
    lambda tokens: attention.capture(
      _gpt, params, tokens, what=(*KINDS, 'output')
    )[1]
  )
  return [run(tokens) for tokens in inputs]


@pytest.fixture(scope='module')
def plain(gpt):
  params, tokens, _ = gpt
  model = hk.transform(_gpt)
  return jax.jit(lambda p, t: model.apply(p, None, t))(params, tokens)


def _edited(gpt, edits):
  params, tokens, _ = gpt
  return jax.jit(lambda p, t: attention.edit(_gpt, p, edits, t))(params, tokens)


def test_captured_values_equal_those_of_numpy(gpt, captured, numpy_gpt):
  params, tokens, _ = gpt
  expected = numpy_gpt(params, np.asarray(tokens), num_heads=H)
  for kind in KINDS:
    for layer in range(2):
      _close(captured[0][kind][_path(kind, layer)], expected[kind][layer], 1e-5)


def test_edits_have_the_effect_that_they_have_in_numpy(gpt, numpy_gpt):
  params, tokens, _ = gpt
  changes = {
    'halved': lambda x: 0.5 * x,
    'reversed': lambda x: x[..., ::-1],
  }

  @jax.jit
  def run(params, tokens):
    return {
      (kind, layer, name): attention.edit(
        _gpt, params, {_path(kind, layer): Edit(kind, change)}, tokens
      )
      for kind in KINDS
      for layer, (name, change) in enumerate(changes.items())
    }

  for (kind, layer, name), logits in run(params, tokens).items():
    expected = numpy_gpt(
      params,
      np.asarray(tokens),
      num_heads=H,
      edits={(layer, kind): changes[name]},
    )
    _close(logits, expected['logits'], 1e-5)


def test_no_edits_change_nothing(gpt, plain):
  params, tokens, _ = gpt
  np.testing.assert_array_equal(_edited(gpt, {}), plain)
  model = hk.transform(_gpt)
  programs = [
    jax.jit(function).lower(params, tokens).as_text()
    for function in (
      lambda p, t: model.apply(p, None, t),
      lambda p, t: attention.edit(_gpt, p, {}, t),
    )
  ]
  assert programs[0] == programs[1]


def test_head_outputs_and_the_bias_sum_to_the_output(gpt, captured):
  params, _, _ = gpt
  for path, shares in captured[0]['head_output'].items():
    total = shares.sum(-2) + params[f'{path}/linear']['b']
    _close(total, captured[0]['output'][path])


def test_head_outputs_include_low_rank_updates(gpt):
  _, tokens, _ = gpt
  function = functools.partial(_gpt, lora={'rank': 2, 'alpha': 4.0})
  params = _init(function, tokens)
  path = 'gpt/block_1/attention'
  logits, values = jax.jit(
    lambda p, t: attention.capture(
      function, p, t, what=('head_output', 'output'), layers=path
    )
  )(params, tokens)
  shares, output = (values[kind][path] for kind in ('head_output', 'output'))
  total = shares.sum(-2) + params[f'{path}/linear']['b']
  _close(total, output, 1e-6 * np.abs(output).max())
  model = hk.transform(function)
  expected = jax.jit(model.apply)(params, None, tokens)
  _close(logits, expected, 1e-6 * np.abs(expected).max())


@pytest.mark.parametrize('kind', KINDS)
def test_replacing_a_value_by_itself_changes_nothing(
  gpt, captured, plain, kind
):
  path = _path(kind, 1)
  edits = {path: Edit(kind, captured[0][kind][path])}
  _close(_edited(gpt, edits), plain, 1e-6 * np.abs(plain).max())


@pytest.mark.parametrize('kind', ['weighted_value', 'head_output', 'pattern'])
def test_ablating_all_heads_leaves_the_bias(gpt, kind):
  params, tokens, _ = gpt
  path = 'gpt/block_1/attention'
  _, output = jax.jit(
    lambda p, t: attention.capture(
      _gpt, p, t, what='output', layers=path, edits={path: Edit(kind)}
    )
  )(params, tokens)
  bias = np.broadcast_to(params[f'{path}/linear']['b'], (B, T, M))
  np.testing.assert_array_equal(output[path], bias)


@pytest.mark.parametrize('kind', ['block_output', 'block_input'])
def test_patching_all_positions_gives_the_other_run(gpt, captured, kind):
  params, _, other = gpt
  layer = _path(kind, 1)
  edits = {layer: Edit(kind, captured[1][kind][layer])}
  expected = jax.jit(lambda t: attention.edit(_gpt, params, {}, t))(other)
  _close(_edited(gpt, edits), expected)


def test_heads_and_positions_are_selected(gpt, captured):
  old, path = captured[0]['query'], 'gpt/block_0/attention'
  new = captured[1]['query'][path]
  for heads, positions in (
    ([1], None),
    (None, [0, -2]),
    ([True, False, True], [3]),
    (jnp.array([0, 2]), np.arange(T) > 4),
  ):
    edit = Edit('query', new, heads=heads, positions=positions)
    params, tokens, _ = gpt
    _, seen = jax.jit(
      lambda p, t, edit=edit: attention.capture(
        _gpt, p, t, what='query', layers=path, edits={path: edit}
      )
    )(params, tokens)
    where = np.zeros((T, H), bool)
    rows = slice(None) if positions is None else np.asarray(positions)
    columns = slice(None) if heads is None else np.asarray(heads)
    part = np.zeros(T, bool)
    part[rows] = True
    where[part] = np.isin(np.arange(H), np.arange(H)[columns])
    expected = np.where(where[..., None], new, old[path])
    np.testing.assert_array_equal(seen[path], expected)


def test_several_edits_are_made_in_order(gpt, captured):
  path = 'gpt/block_0/attention'
  twice = _edited(
    gpt,
    {path: [Edit('value', lambda x: 2 * x), Edit('value', lambda x: x + 1)]},
  )
  once = _edited(gpt, {path: Edit('value', lambda x: 2 * x + 1)})
  _close(twice, once)
  both = _edited(gpt, {'gpt/block_*': Edit('weighted_value', heads=[0])})
  each = _edited(
    gpt,
    {_path('value', i): Edit('weighted_value', heads=[0]) for i in range(2)},
  )
  np.testing.assert_array_equal(both, each)


def test_edits_are_differentiable_and_batched(gpt, captured):
  params, tokens, _ = gpt
  path = 'gpt/block_1/attention'
  pattern = captured[0]['pattern'][path]

  def total(new):
    edits = {path: Edit('pattern', new, heads=[1])}
    return jnp.square(attention.edit(_gpt, params, edits, tokens)).sum()

  direction = np.random.default_rng(2).normal(size=pattern.shape)
  gradient = jax.jit(jax.grad(total))(pattern)
  assert not gradient[:, 0].any()
  step = 1e-2 * jnp.asarray(direction, jnp.float32)
  ahead, behind = jax.jit(jax.vmap(total))(
    jnp.stack([pattern + step, pattern - step])
  )
  np.testing.assert_allclose(
    (gradient * step).sum(), (ahead - behind) / 2, rtol=1e-3
  )
  np.testing.assert_allclose(ahead, total(pattern + step), rtol=1e-5)


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
def mixed():
  x = jax.random.normal(jax.random.key(0), (B, T, M))
  return _init(_mixed, x), x


def _without_head(params, linear, head, num_heads, layer=()):
  """Parameters whose output projection ignores a head."""
  w = np.array(params[linear]['w'])
  rows = w[layer].reshape(num_heads, -1, w.shape[-1])
  rows[head] = 0
  return params | {linear: params[linear] | {'w': jnp.asarray(w)}}


def test_edits_reach_stacks_and_repeated_calls(mixed):
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
    _close(output, apply(without), 2e-5 * np.abs(output).max())


def test_calls_of_one_module_are_edited_apart(arrays):
  (x,) = arrays((B, T, M))

  def function(x):
    twice = attention.MultiHeadAttention(num_heads=H, name='twice')
    return twice(twice(x))

  def once(x):
    return attention.MultiHeadAttention(num_heads=H, name='twice')(x)

  params = _init(function, x)

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
  _close(edited, expected, 1e-5)


def test_values_by_layer_replace_those_of_a_stack(mixed):
  params, x = mixed
  _, patterns = attention.capture(_mixed, params, x, layers=STACK)
  new = patterns[STACK][:, ::-1]

  @jax.jit
  def run(params):
    whole = {STACK: Edit('pattern', new)}
    each = {f'{STACK}[{i}]': Edit('pattern', new[i]) for i in range(3)}
    return [attention.edit(_mixed, params, e, x) for e in (whole, each)]

  whole, each = run(params)
  _close(whole, each, 1e-5 * np.abs(whole).max())


def test_blocks_of_an_evoformer_are_edited(arrays):
  # More rows than its layers process at a time.
  msa, pair = arrays((53, 41, 6), (41, 41, 4))

  def function(msa, pair):
    return EvoformerStack(
      num_blocks=3, num_msa_head=3, num_pair_head=2, name='stack'
    )(msa, pair)

  params = _init(function, msa, pair)
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
    _close(output, apply(without), 1e-4)

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


def test_alphafolds_stack_and_recycling_are_captured_and_edited(arrays):
  (x,) = arrays((B, T, M))
  model = hk.transform(_recycled)
  params = _init(_recycled, x)
  output, patterns = jax.jit(lambda p: attention.capture(_recycled, p, x))(
    params
  )
  _close(output, jax.jit(lambda p: model.apply(p, None, x))(params), 1e-5)
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
  _close([patterns[path], patterns[last]], [in_loop, after], 1e-5)
  _close(output, z, 1e-4)
  edited = jax.jit(
    lambda p: attention.edit(
      _recycled, p, {f'{last}[1]': Edit('pattern', heads=[1])}, x
    )
  )(params)
  _close(edited, stack(y, edited=1)[0], 1e-4)


def test_layers_that_are_not_edited_keep_their_implementation(arrays):
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

  params = _init(function, x)

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


def test_bfloat16_stays(arrays):
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
  _close(edited.astype('float32'), plain.astype('float32'), 2e-2)


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


def test_sweeps_equal_single_edits(gpt, captured):
  params, tokens, _ = gpt
  other = captured[1]['block_output']

  @jax.jit
  def run(params, tokens):
    heads = analysis.sweep(
      _gpt,
      params,
      Edit('pattern', positions=[4]),
      tokens,
      metric=lambda logits: logits[:, -1, 3],
    )
    positions = analysis.sweep(
      _gpt,
      params,
      Edit('block_output', other),
      tokens,
      over='positions',
      batch_size=4,
    )
    return heads, positions

  heads, positions = run(params, tokens)
  assert heads.shape == (2, H, B)
  assert positions.shape == (2, T, B, T, 11)

  @jax.jit
  def each(params, tokens):
    edit = functools.partial(attention.edit, _gpt, params)
    return [
      edit(
        {f'gpt/block_{layer}/attention': Edit('pattern', 0, [2], [4])}, tokens
      )[:, -1, 3]
      for layer in range(2)
    ], edit(
      {'gpt/block_1': Edit('block_output', other['gpt/block_1'], None, [3])},
      tokens,
    )

  ablated, patched = each(params, tokens)
  _close(list(heads[:, 2]), ablated, 2e-6)
  _close(positions[1, 3], patched, 2e-6)


def test_a_sweep_goes_through_the_layers_of_a_stack(mixed):
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
  _close(swept[2, 1], single, 1e-5 * np.abs(single).max())


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


def test_parts_sum_to_the_stream_and_their_shares_to_the_logit(
  gpt, plain, numpy_gpt
):
  params, tokens, _ = gpt
  residual = jax.jit(lambda p, t: analysis.decompose(_gpt, p, t).parts()[1])
  stream = analysis.decompose(_gpt, params, tokens)
  names, parts = stream.parts()
  assert names[:3] == ['embedding', 'layer 0 head 0', 'layer 0 head 1']
  assert len(names) == len(parts) == 1 + 2 * (H + 2)
  _close(residual(params, tokens), parts, 4e-6)
  _close(parts.sum(0), stream.stream, 4e-6)
  expected = numpy_gpt(params, np.asarray(tokens), num_heads=H)
  _close(list(stream.feed_forward), expected['feed_forward_output'], 1e-5)

  norm, unembedding = analysis.readout(params)
  shares = analysis.direct_attribution(
    parts, stream.stream, unembedding[:, 3], norm=norm
  )
  total = shares.sum(0) + unembedding[:, 3] @ norm.offset
  _close(total, plain[..., 3], 1e-5)
  _close(
    analysis.logit_lens(stream.stream, unembedding, norm=norm), plain, 1e-5
  )


def test_streams_that_are_no_sums_are_not_decomposed(gpt):
  _, tokens, _ = gpt
  for norm in ('post', 'both'):
    function = functools.partial(_gpt, norm=norm)
    params = _init(function, tokens)
    with pytest.raises(ValueError, match="blocks with norm='pre'"):
      analysis.decompose(function, params, tokens)


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


def test_values_and_edits_with_products_in_bfloat16_are_near(gpt, captured):
  params, tokens, _ = gpt
  path = _path('head_output', 1)
  edits = {path: Edit('head_output', lambda x: 0.5 * x)}
  expected = _edited(gpt, edits)

  @jax.jit
  def run(params, tokens):
    _, values = attention.capture(_gpt, params, tokens, what=KINDS)
    return values, attention.edit(_gpt, params, edits, tokens)

  with products.operands_in(jnp.bfloat16):
    values, logits = run(params, tokens)
  for kind in KINDS:
    _close(values[kind], captured[0][kind], 0.05)
  assert (logits != expected).any()
  _close(logits, expected, 0.05)
