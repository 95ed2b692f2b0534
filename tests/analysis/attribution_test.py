"""Tests of logits of the residual stream and of its parts."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import analysis, models
from attention.modules.layers import NORMS

N, B, T, M, V = 5, 2, 4, 6, 7
KINDS = ('layer', 'rms', 'zero_centred_rms', 'none')
EPSILON = 0.3  # large, so that tests see whether it is added


def _norm(kind, arrays):
  scale, offset = arrays((M,), (M,), seed=1)
  if kind == 'none':
    return analysis.FinalNorm(kind=kind, scale=None)
  if kind != 'layer':
    offset = None
  return analysis.FinalNorm(
    kind=kind, scale=scale, offset=offset, epsilon=EPSILON
  )


def _parts(arrays):
  """Parts [N, B, T, M] of a stream whose mean and scale are not 0 and 1."""
  (parts,) = arrays((N, B, T, M))
  parts = parts + 2 * jnp.arange(N)[:, None, None, None] + jnp.arange(M)
  return parts, parts.sum(0)


def _normed(kind, vector, scale, offset):
  """The norm of one vector [M], in loops."""
  vector = [float(x) for x in vector]
  if kind == 'none':
    return vector
  mean = sum(vector) / M if kind == 'layer' else 0
  square = sum((x - mean) ** 2 for x in vector) / M
  return [
    (x - mean)
    / (square + EPSILON) ** 0.5
    * (float(scale[i]) + (kind == 'zero_centred_rms'))
    + (0 if offset is None else float(offset[i]))
    for i, x in enumerate(vector)
  ]


@pytest.mark.parametrize('kind', KINDS)
def test_norm_is_that_of_a_loop_and_of_the_models(kind, arrays, assert_close):
  norm, (_, stream) = _norm(kind, arrays), _parts(arrays)
  expected = np.array(
    [
      [_normed(kind, stream[b, t], norm.scale, norm.offset) for t in range(T)]
      for b in range(B)
    ]
  )
  assert_close(norm(stream), expected)
  assert_close(jax.jit(lambda n, x: n(x))(norm, stream), expected)
  if kind == 'none':
    return
  model = hk.transform(lambda x: NORMS[kind](name='n', epsilon=EPSILON)(x))
  fields = {'scale': norm.scale, 'offset': norm.offset}
  params = {'n': {k: v for k, v in fields.items() if v is not None}}
  assert_close(norm(stream), model.apply(params, None, stream))


@pytest.mark.parametrize('of_each', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_parts_and_offset_sum_to_the_logit(kind, of_each, arrays, assert_close):
  norm, (parts, stream) = _norm(kind, arrays), _parts(arrays)
  (direction,) = arrays((B, T, M) if of_each else (M,), seed=2)
  shares = analysis.direct_attribution(parts, stream, direction, norm=norm)
  assert shares.shape == (N, B, T) and shares.dtype == jnp.float32
  logit = (norm(stream) * direction).sum(-1)
  constant = 0 if norm.offset is None else direction @ norm.offset
  assert_close(shares.sum(0) + constant, logit)
  # The parts' axes may be any number, and some may be left out.
  nested = analysis.direct_attribution(
    parts[:4].reshape(2, 2, B, T, M), stream, direction, norm=norm
  )
  np.testing.assert_array_equal(nested.reshape(4, B, T), shares[:4])
  one = analysis.direct_attribution(parts[1], stream, direction, norm=norm)
  np.testing.assert_array_equal(one, shares[1])


@pytest.mark.parametrize('kind', KINDS)
def test_shares_are_those_of_a_loop(kind, arrays, assert_close):
  norm, (parts, stream) = _norm(kind, arrays), _parts(arrays)
  direction = np.asarray(arrays((M,), seed=2)[0], np.float64)
  expected = np.zeros((N, B, T))
  for n, b, t in np.ndindex(N, B, T):
    part = np.asarray(parts[n, b, t], np.float64)
    whole = np.asarray(stream[b, t], np.float64)
    if kind == 'layer':
      part, whole = part - part.mean(), whole - whole.mean()
    if kind != 'none':
      part = part / np.sqrt((whole**2).mean() + EPSILON)
      part = part * (norm.scale + (kind == 'zero_centred_rms'))
    expected[n, b, t] = part @ direction
  run = jax.jit(analysis.direct_attribution)
  assert_close(run(parts, stream, direction, norm=norm), expected)


def test_norm_is_linear_in_the_parts(arrays, assert_close):
  norm, (parts, stream) = _norm('layer', arrays), _parts(arrays)
  linearised = norm.linearised(parts, stream)
  assert_close(norm.linearised(3 * parts, stream), 3 * linearised)
  assert not norm.linearised(jnp.zeros(M), stream).any()


def test_norm_is_a_pytree_of_its_arrays(arrays):
  norm = _norm('layer', arrays)
  assert len(jax.tree.leaves(norm)) == 2
  doubled = jax.tree.map(lambda x: 2 * x, norm)
  np.testing.assert_array_equal(doubled.scale, 2 * norm.scale)
  assert (doubled.kind, doubled.epsilon) == ('layer', EPSILON)


@pytest.mark.parametrize('kind', KINDS)
def test_logit_lens_is_norm_and_unembedding(kind, arrays, assert_close):
  norm, (_, stream) = _norm(kind, arrays), _parts(arrays)
  (unembedding,) = arrays((M, V), seed=3)
  expected = np.array(
    [
      [
        np.array(_normed(kind, stream[b, t], norm.scale, norm.offset))
        @ np.asarray(unembedding, np.float64)
        for t in range(T)
      ]
      for b in range(B)
    ]
  )
  run = jax.jit(analysis.logit_lens)
  assert_close(run(stream, unembedding, norm=norm), expected)
  plain = analysis.logit_lens(stream, unembedding)
  assert_close(plain, np.asarray(stream) @ np.asarray(unembedding))


def test_bfloat16_streams_give_float32(arrays):
  norm, (parts, stream) = _norm('layer', arrays), _parts(arrays)
  unembedding, direction = arrays((M, V), (M,), seed=3)
  half = jnp.bfloat16
  shares = analysis.direct_attribution(
    parts.astype(half), stream.astype(half), direction.astype(half), norm=norm
  )
  logits = analysis.logit_lens(
    stream.astype(half),
    unembedding.astype(half),
    norm=lambda x: norm(x).astype(half),
  )
  assert shares.dtype == logits.dtype == jnp.float32


def test_parts_of_a_gpt_sum_to_its_logits(numpy_gpt, assert_close):
  tokens = np.arange(B * T).reshape(B, T) % V
  model = hk.transform(
    lambda tokens: models.create(
      'gpt',
      vocab_size=V,
      context_size=T,
      num_layers=2,
      num_heads=3,
      model_size=M,
    )(tokens)
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
  )
  found = numpy_gpt(params, tokens, num_heads=3)
  stream = found['final_stream']
  biases = [
    np.broadcast_to(params[f'gpt/block_{i}/attention/linear']['b'], (B, T, M))
    for i in range(2)
  ]
  parts = np.stack(
    [
      found['block_input'][0],
      *np.moveaxis(np.concatenate(found['head_output'], 2), 2, 0),
      *biases,
      *found['feed_forward_output'],
    ]
  )
  assert_close(parts.sum(0), stream, dtype='float32')

  norm = analysis.FinalNorm(**params['gpt/final_norm'])
  unembedding = params['gpt/tokens']['embeddings'].T
  logits = jax.jit(model.apply)(params, None, tokens)
  lens = analysis.logit_lens(stream, unembedding, norm=norm)
  assert_close(lens, logits)
  for direction, expected in (
    (unembedding[:, 3], logits[..., 3]),
    (unembedding[:, 3] - unembedding[:, 1], logits[..., 3] - logits[..., 1]),
    (
      unembedding.T[tokens],
      np.take_along_axis(logits, tokens[..., None], -1)[..., 0],
    ),
  ):
    shares = analysis.direct_attribution(parts, stream, direction, norm=norm)
    assert shares.shape == (len(parts), B, T)
    assert_close(shares.sum(0) + direction @ norm.offset, expected)


def test_wrong_arguments_are_refused(arrays):
  norm, (parts, stream) = _norm('layer', arrays), _parts(arrays)
  unembedding, direction = arrays((M, V), (M,), seed=3)
  with pytest.raises(ValueError, match=r"kind: .*'layr'; did you mean 'layer'"):
    analysis.FinalNorm(kind='layr', scale=None)
  for wrong in (unembedding.T, direction):
    with pytest.raises(ValueError, match=r'unembedding: expected \[m, v\] .*6'):
      analysis.logit_lens(stream, wrong)
  run = analysis.direct_attribution
  with pytest.raises(ValueError, match=r'stream: expected \[\*b, t, m\], got'):
    run(parts, stream[0, 0], direction, norm=norm)
  for wrong in (parts[:, 0], parts[..., :-1], direction):
    with pytest.raises(ValueError, match=r'parts: expected .* \(2, 4, 6\)'):
      run(wrong, stream, direction, norm=norm)
  for wrong in (direction[:-1], stream[0], unembedding):
    with pytest.raises(ValueError, match=r'direction: expected shape \(6,\)'):
      run(parts, stream, wrong, norm=norm)
