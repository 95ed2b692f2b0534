"""What capture reads and edit changes in a GPT, sweeps and decompositions."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
from attention import Edit, analysis, models
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


def _path(kind, layer):
  return f'gpt/block_{layer}' + ('' if 'block' in kind else '/attention')


@pytest.fixture(scope='module')
def gpt(random_params):
  """(params, tokens, other tokens)."""
  tokens = np.random.default_rng(1).integers(0, 11, (2, B, T))
  first, second = jnp.asarray(tokens)
  return random_params(_gpt, first), first, second


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


def test_captured_values_equal_those_of_numpy(
  gpt, captured, numpy_gpt, assert_near
):
  params, tokens, _ = gpt
  expected = numpy_gpt(params, np.asarray(tokens), num_heads=H)
  for kind in KINDS:
    for layer in range(2):
      assert_near(
        captured[0][kind][_path(kind, layer)], expected[kind][layer], 1e-5
      )


def test_edits_have_the_effect_that_they_have_in_numpy(
  gpt, numpy_gpt, assert_near
):
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
    assert_near(logits, expected['logits'], 1e-5)


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


def test_head_outputs_and_the_bias_sum_to_the_output(
  gpt, captured, assert_near
):
  params, _, _ = gpt
  for path, shares in captured[0]['head_output'].items():
    total = shares.sum(-2) + params[f'{path}/linear']['b']
    assert_near(total, captured[0]['output'][path])


def test_head_outputs_include_low_rank_updates(gpt, random_params, assert_near):
  _, tokens, _ = gpt
  function = functools.partial(_gpt, lora={'rank': 2, 'alpha': 4.0})
  params = random_params(function, tokens)
  path = 'gpt/block_1/attention'
  logits, values = jax.jit(
    lambda p, t: attention.capture(
      function, p, t, what=('head_output', 'output'), layers=path
    )
  )(params, tokens)
  shares, output = (values[kind][path] for kind in ('head_output', 'output'))
  total = shares.sum(-2) + params[f'{path}/linear']['b']
  assert_near(total, output, 1e-6 * np.abs(output).max())
  model = hk.transform(function)
  expected = jax.jit(model.apply)(params, None, tokens)
  assert_near(logits, expected, 1e-6 * np.abs(expected).max())


@pytest.mark.parametrize('kind', KINDS)
def test_replacing_a_value_by_itself_changes_nothing(
  gpt, captured, plain, kind, assert_near
):
  path = _path(kind, 1)
  edits = {path: Edit(kind, captured[0][kind][path])}
  assert_near(_edited(gpt, edits), plain, 1e-6 * np.abs(plain).max())


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
def test_patching_all_positions_gives_the_other_run(
  gpt, captured, kind, assert_near
):
  params, _, other = gpt
  layer = _path(kind, 1)
  edits = {layer: Edit(kind, captured[1][kind][layer])}
  expected = jax.jit(lambda t: attention.edit(_gpt, params, {}, t))(other)
  assert_near(_edited(gpt, edits), expected)


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


def test_several_edits_are_made_in_order(gpt, captured, assert_near):
  path = 'gpt/block_0/attention'
  twice = _edited(
    gpt,
    {path: [Edit('value', lambda x: 2 * x), Edit('value', lambda x: x + 1)]},
  )
  once = _edited(gpt, {path: Edit('value', lambda x: 2 * x + 1)})
  assert_near(twice, once)
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


def test_sweeps_equal_single_edits(gpt, captured, assert_near):
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
  assert_near(list(heads[:, 2]), ablated, 2e-6)
  assert_near(positions[1, 3], patched, 2e-6)


def test_parts_sum_to_the_stream_and_their_shares_to_the_logit(
  gpt, plain, numpy_gpt, assert_near
):
  params, tokens, _ = gpt
  residual = jax.jit(lambda p, t: analysis.decompose(_gpt, p, t).parts()[1])
  stream = analysis.decompose(_gpt, params, tokens)
  names, parts = stream.parts()
  assert names[:3] == ['embedding', 'layer 0 head 0', 'layer 0 head 1']
  assert len(names) == len(parts) == 1 + 2 * (H + 2)
  assert_near(residual(params, tokens), parts, 4e-6)
  assert_near(parts.sum(0), stream.stream, 4e-6)
  expected = numpy_gpt(params, np.asarray(tokens), num_heads=H)
  assert_near(list(stream.feed_forward), expected['feed_forward_output'], 1e-5)

  norm, unembedding = analysis.readout(params)
  shares = analysis.direct_attribution(
    parts, stream.stream, unembedding[:, 3], norm=norm
  )
  total = shares.sum(0) + unembedding[:, 3] @ norm.offset
  assert_near(total, plain[..., 3], 1e-5)
  assert_near(
    analysis.logit_lens(stream.stream, unembedding, norm=norm), plain, 1e-5
  )


def test_streams_that_are_no_sums_are_not_decomposed(gpt, random_params):
  _, tokens, _ = gpt
  for norm in ('post', 'both'):
    function = functools.partial(_gpt, norm=norm)
    params = random_params(function, tokens)
    with pytest.raises(ValueError, match="blocks with norm='pre'"):
      analysis.decompose(function, params, tokens)


def test_values_and_edits_with_products_in_bfloat16_are_near(
  gpt, captured, assert_near
):
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
    assert_near(values[kind], captured[0][kind], 0.05)
  assert (logits != expected).any()
  assert_near(logits, expected, 0.05)
