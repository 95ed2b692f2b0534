import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.ops import biases
from attention.ops.cache import Cache, align
from attention.ops.dot_product import dot_product_attention
from attention.ops.masks import Mask

B, T, H, G, D, E, N = 3, 11, 6, 2, 5, 7, 17


def _heads(arrays):
  return arrays((B, T, H, D), (B, T, G, D), (B, T, G, E))


_attend = jax.jit(dot_product_attention)


def _in_pieces(
  query, key, value, sizes, start=None, window=None, spare=0, **arguments
):
  """Attend through a cache, feeding `sizes` tokens at a time."""
  cache = Cache.create(N, start, window=window, spare=spare)
  outputs, at = [], 0
  for size in sizes:
    part = slice(at, at + size)
    cache, (k, v, mask, bias) = cache.extend(
      key[:, part], value[:, part], **arguments
    )
    outputs.append(_attend(query[:, part], k, v, mask=mask, bias=bias))
    at += size
  assert cache.length == at
  assert cache.key.shape[-1] == cache.value.shape[-2] == cache.num_slots
  return jnp.concatenate(outputs, axis=1)


_SEGMENTS = np.broadcast_to(np.arange(N) // 4, (B, N))
_CASES = {
  'causal': dict(mask=Mask.causal()),
  'window': dict(mask=Mask.causal() & Mask.window(left=3)),
  'segments': dict(mask=Mask.causal() & Mask.segments(_SEGMENTS)),
  'array': dict(mask=np.tri(N, dtype=bool)),
  'prefix': dict(mask=Mask.prefix(np.array([2, 1, 3]))),
  'alibi': dict(mask=Mask.causal(), bias=biases.alibi(H)),
  'bias': dict(
    mask=Mask.causal(),
    bias=np.random.default_rng(0).normal(size=(H, N, N)).astype(np.float32),
  ),
}


def _whole(case):
  """Return the case's arguments for attention without a cache."""
  if case == 'segments':
    return {'mask': Mask.causal() & Mask.segments(_SEGMENTS[:, :T])}
  return {
    name: x[..., :T, :T] if isinstance(x, np.ndarray) else x
    for name, x in _CASES[case].items()
  }


@pytest.mark.parametrize('case', _CASES)
def test_incremental_attention_matches_whole(case, arrays, assert_close):
  heads = _heads(arrays)
  expected = _attend(*heads, **_whole(case))
  # The first piece holds the whole prefix, which attends to all of itself.
  for sizes in ([T], [4, 1, 1, 5], [3, *[1] * (T - 3)]):
    assert_close(_in_pieces(*heads, sizes, **_CASES[case]), expected)


@pytest.mark.parametrize(
  'case', ['causal', 'segments', 'array', 'alibi', 'bias']
)
def test_a_window_is_kept_in_as_many_slots(case, arrays, assert_close):
  heads = _heads(arrays)
  arguments = _whole(case)
  mask = arguments['mask']
  mask = Mask.dense(mask) if case == 'array' else mask
  arguments['mask'] = mask & Mask.window(left=3)
  expected = _attend(*heads, **arguments)
  one_by_one = [1] * T
  for sizes, spare in (
    (one_by_one, 0),
    ([3, *[1] * (T - 3)], 2),
    ([6, 4, 1], 0),  # longer than the window, and as long
    ([2, 2, 2, 5], 1),
    ([1, 7, 3], 4),
  ):
    actual = _in_pieces(*heads, sizes, window=4, spare=spare, **_CASES[case])
    assert_close(actual, expected)


@pytest.mark.parametrize('window', [1, 4, N - 1, N, N + 5])
def test_padded_rows_of_a_window_match_rows_without(
  window, arrays, assert_close
):
  query, key, value = _heads(arrays)
  start = np.array([0, 4, 2], np.int32)
  mask = Mask.causal() & Mask.window(left=window - 1)
  whole = _attend(
    query, key, value, mask=mask & Mask.dense(_real(start)[..., :T])
  )
  for sizes in ([T], [5, 1, 4, 1]):
    actual = _in_pieces(
      query, key, value, sizes, start, window=window, mask=Mask.causal()
    )
    assert_close(actual, whole)


def _real(start):
  return (np.arange(N) >= start[:, None])[:, None, None]


@pytest.mark.parametrize(('window', 'spare'), [(None, 0), (4, 3), (4, N)])
def test_tokens_after_rewinding_replace_the_forgotten(
  window, spare, arrays, assert_close
):
  heads = _heads(arrays)
  wrong = [-x for x in heads]
  mask = Mask.causal()
  extend = jax.jit(lambda cache, k, v: cache.extend(k, v, mask))
  # Four wrong tokens after one that stays, in place of three that are kept.
  cache, _ = extend(
    Cache.create(N, window=window, spare=spare),
    heads[1][:, :4],
    heads[2][:, :4],
  )
  outputs = []
  for at in range(4, T):
    tries = [
      jnp.concatenate([x[:, at : at + 1], y[:, :3]], axis=1)
      for x, y in zip(heads[1:], wrong[1:], strict=True)
    ]
    cache, (k, v, seen, _) = extend(cache, *tries)
    outputs.append(_attend(heads[0][:, at : at + 1], k, v, mask=_first(seen)))
    cache = jax.jit(Cache.rewind)(cache, 3)
  expected = _attend(
    *heads, mask=mask if window is None else mask & Mask.window(window - 1)
  )
  assert_close(jnp.concatenate(outputs, axis=1), expected[:, 4:])


def _first(mask):
  """The mask of the first query."""
  (array,) = mask.arrays()
  return array[..., :1, :]


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
@pytest.mark.parametrize('size', [T, N])
def test_prompt_arrays_cover_prompt_or_all_slots(
  arrays, assert_close, implementation, size
):
  heads = _heads(arrays)
  (bias,) = arrays((H, size, size))
  mask = np.tri(size, dtype=bool)
  _, (k, v, *more) = Cache.create(N).extend(*heads[1:], mask, bias)
  actual = dot_product_attention(
    heads[0],
    k,
    v,
    **dict(zip(('mask', 'bias'), more, strict=True)),
    implementation=implementation,
  )
  expected = dot_product_attention(
    *heads, bias=bias[:, :T, :T], is_causal=True, implementation='reference'
  )
  assert_close(actual, expected)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(bias=np.ones((H, N, N), bool)), 'bias: .*; pass booleans as mask='),
    (dict(bias=np.ones((N, N), 'f')), r'bias: .*\[h, q, k\] or rank 4'),
    (dict(bias=np.ones(N, 'f')), r'bias: .*\[h, q, k\] or rank 4'),
    (dict(bias=np.ones((H, N, T), 'f')), r'bias: .*\(3, 6, 17, 17\), got'),
    (dict(mask=np.ones((B, N, N), bool)), r'mask: expected \[q, k\] or rank 4'),
    (dict(mask=Mask.dense(np.ones((N, 2), bool))), 'mask: .* broadcastable'),
    (
      dict(mask=Mask.segments(np.ones((B, 3), int))),
      'mask: query_ids: expected',
    ),
  ],
)
def test_arrays_that_do_not_fit_slots_raise(arguments, message):
  key = jnp.ones((B, T, G, D))
  empty = Cache.create(N, np.zeros(B, int))
  later, _ = empty.extend(key, key)
  for cache, new in ((empty, key), (later, key[:, :1])):
    with pytest.raises(ValueError, match=message):
      cache.extend(new, new, **arguments)


def test_padded_rows_match_rows_without_padding(arrays, assert_close):
  query, key, value = _heads(arrays)
  start = np.array([0, 4, 2], np.int32)
  for sizes in ([T], [5, 1, 4, 1]):
    actual = _in_pieces(
      query, key, value, sizes, start, mask=Mask.causal() & Mask.window(left=6)
    )
    for row, first in enumerate(start):
      alone = _attend(
        *(x[row : row + 1, first:] for x in (query, key, value)),
        mask=Mask.causal() & Mask.window(left=6),
      )
      assert_close(actual[row : row + 1, first:], alone)
      assert not np.asarray(actual[row, :first]).any()  # fully masked


def test_positions_exclude_padding():
  cache = Cache.create(N, np.array([0, 3]))
  np.testing.assert_array_equal(
    cache.positions(5), [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
  )
  key = jnp.ones((2, 5, G, D))
  cache, _ = cache.extend(key, key)
  np.testing.assert_array_equal(cache.positions(2), [[5, 6], [2, 3]])
  np.testing.assert_array_equal(Cache.create(N).positions(3), [0, 1, 2])


def test_unused_slots_are_masked_without_a_mask(arrays, assert_close):
  heads = _heads(arrays)
  actual = _in_pieces(*heads, [T - 1, 1])[:, -1:]
  expected = dot_product_attention(heads[0][:, -1:], *heads[1:])
  assert_close(actual, expected)


def test_more_tokens_than_slots_raise():
  key = jnp.ones((2, 5, G, D))
  with pytest.raises(ValueError, match='at most capacity=4 tokens, got 5'):
    Cache.create(4).extend(key, key)
  with pytest.raises(ValueError, match='capacity: expected 1 or more, got 0'):
    Cache.create(0)
  with pytest.raises(ValueError, match='window: expected 1 or more, got 0'):
    Cache.create(4, window=0)
  with pytest.raises(ValueError, match='spare: expected 0 or more, got -1'):
    Cache.create(4, spare=-1)


@pytest.mark.parametrize(('rows', 'window'), [(1, None), (8, None), (1, 2048)])
def test_loop_writes_buffers_in_place(rows, window):
  """A donated cache needs no second copy, whatever its batch size."""
  steps, size = 64, (rows, (window or 4096) // rows, 4, 32)
  cache = Cache.create(4096 // rows, window=window)
  new = jnp.ones((rows, 3, 4, 32))
  cache, _ = cache.extend(new, new)

  def loop(cache, x):
    def body(_, carry):
      cache, x = carry
      cache, (k, v, mask, _) = cache.extend(x, x, Mask.causal())
      return cache, dot_product_attention(x, k, v, mask=mask)

    return jax.lax.fori_loop(0, steps, body, (cache, x))

  compiled = (
    jax.jit(loop, donate_argnums=0).lower(cache, jnp.ones((rows, 1, 4, 32)))
  ).compile()
  memory = compiled.memory_analysis()
  buffers = 2 * 4 * np.prod(size)
  assert memory.alias_size_in_bytes >= buffers
  assert memory.temp_size_in_bytes < buffers / 4


def test_prompts_are_right_aligned():
  tokens, start = align([[5, 6, 7], [8]])
  np.testing.assert_array_equal(tokens, [[5, 6, 7], [8, 8, 8]])
  np.testing.assert_array_equal(start, [0, 2])
  assert align([[5]], 4)[0].shape == (1, 4)
  for wrong in ([[1], []], [[1, 2, 3]]):
    with pytest.raises(ValueError, match='expected 1 to [12] tokens each'):
      align(wrong, 2 if len(wrong) == 1 else None)


@pytest.mark.slow  # compiled with XLA's optimisations
def test_rows_of_bfloat16_with_grouped_heads_are_attended():
  key = jnp.ones((2, 3, G, D), jnp.bfloat16)
  cache, _ = Cache.create(N).extend(key, key)

  @jax.jit
  def attend(cache, query, key):
    _, (k, v, mask, _) = cache.extend(key, key, Mask.causal())
    return dot_product_attention(query, k, v, mask=mask)

  query = jnp.ones((2, 1, H, D), jnp.bfloat16)
  np.testing.assert_array_equal(attend(cache, query, key[:, :1]), query)
