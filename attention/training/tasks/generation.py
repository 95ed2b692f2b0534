"""Generating text with a GPT piece by piece: its programs, caches and ends."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from attention import decoding
from attention.models.gpt import window_step
from attention.ops.cache import Cache, align

PIECE = 16  # tokens that are generated at a time
_CHUNK = 512  # tokens that are read at a time
_SHORT = 64  # the spare slots of windows after short prompts
_OPTIONS = ('temperature', 'top_k', 'top_p', 'min_p')


@dataclasses.dataclass(eq=False)
class Draft:
  """A small model that proposes tokens; see `decoding.speculative`."""

  generator: 'Generator'
  params: dict
  vocabulary: object
  num_draft: int = 4
  accepted: list = dataclasses.field(default_factory=list)  # in each piece


class Generator:
  """Generates tokens with a GPT of any mixer, with few compiled programs."""

  def __init__(self, apply, *, vocab_size, context_size, has_cache):
    """Create a generator.

    Args:
      apply: (params, tokens [b, t], cache=None, num_logits=None) -> logits
        [b, t, v], or of the last positions, and the new cache if there is one.
      vocab_size: number of tokens to choose from; the model may have more
        logits.
      context_size: the longest input.
      has_cache: whether the model supports a cache.
    """
    self._apply = apply
    self.vocab_size = vocab_size
    self.context_size = context_size
    self.has_cache = has_cache

  @property
  def piece_size(self) -> int:
    return max(1, min(PIECE, self.context_size // 4))

  def pieces(self, params, rows, num_tokens, rng, *, draft=None, **options):
    """Yield the continuation of token sequences in pieces.

    The cache is kept until its capacity, the context size at most, is used up.
    From there on, the tokens that fit before a piece are read again for each.

    Args:
      params: the model's parameters. If a mesh replicates them, its devices
        share the rows.
      rows: lists of tokens, of any lengths; one only if there is no cache.
      num_tokens: the least number of tokens to generate.
      rng: a key.
      draft: a `Draft` of the same vocabulary, or None.
      **options: see `decoding.sample`; None values are ignored.

    Yields:
      int32 [b, piece_size].
    """
    count = len(rows)
    rows = [list(row) for row in rows]
    over = _over_devices(params)
    if over is not None and count > 1:
      rows += [list(rows[-1]) for _ in range(-count % over.num_devices)]
    options = {k: v for k, v in options.items() if v is not None}
    write = functools.partial(self._recompute, params)
    if self.has_cache:
      write = _Writer(self, params, num_tokens, draft).write
    for drawn in range(0, num_tokens, self.piece_size):
      if 'repetition_penalty' in options:
        options['seen'] = self._seen(rows)
      key = jax.random.fold_in(rng, drawn)
      piece = np.asarray(write(rows, key, options))
      for row, tokens in zip(rows, piece.tolist(), strict=True):
        row += tokens
      yield piece[:count]

  def _seen(self, rows):
    seen = np.zeros((len(rows), self.vocab_size), bool)
    for found, tokens in zip(seen, rows, strict=True):
      found[tokens] = True
    return seen

  def _step(self, params, tokens, cache, **more):
    """(logits [b, t, v] of the vocabulary, cache)."""
    logits, cache = self._apply(params, tokens, cache=cache, **more)
    return logits[..., : self.vocab_size], cache

  def _last(self, params):
    """The step for `attention.decoding`."""

    def last(tokens, cache):
      logits, cache = self._step(params, tokens, cache, num_logits=1)
      return logits[:, 0], cache

    return last

  def read(self, params, tokens, start, ends, chunk, capacity, spare):
    """Read tokens [b, t] in chunks that end at `ends`; returns the cache."""
    cache, before = None, 0
    for end in ends:
      part = _shard(tokens[:, end - chunk : end], params)
      if cache is None:
        cache = self._read_first(
          params, part, start, capacity=capacity, spare=spare
        )
      else:
        surplus = np.int32(before - (end - chunk))
        cache = self._read_next(params, part, cache, surplus)
      before = end
    return cache

  @functools.cached_property
  def _read_first(self):
    def read(params, tokens, start, *, capacity, spare):
      cache = Cache.create(capacity, start, spare=spare)
      return self._step(params, tokens, cache)[1]

    return jax.jit(read, static_argnames=('capacity', 'spare'))

  @functools.cached_property
  def _read_next(self):
    def read(params, tokens, cache, surplus):
      return self._step(params, tokens, decoding.rewind(cache, surplus))[1]

    return jax.jit(read, donate_argnames='cache')

  @functools.cached_property
  def sample(self):
    def sample(params, tokens, cache, surplus, rng, *, num_tokens, **options):
      return decoding.sample(
        self._last(params),
        decoding.rewind(cache, surplus),
        tokens,
        num_tokens,
        rng,
        with_cache=True,
        **options,
      )

    return jax.jit(
      sample,
      static_argnames=('num_tokens', 'end', 'repetition_penalty', *_OPTIONS),
      donate_argnames='cache',
    )

  @functools.cached_property
  def speculate(self):
    def speculate(
      params, draft_params, tokens, caches, surplus, rng, *, draft, **options
    ):
      cache, draft_cache = decoding.rewind(caches, surplus)
      return decoding.speculative(
        functools.partial(self._step, params),
        cache,
        functools.partial(draft._step, draft_params),
        draft_cache,
        tokens,
        rng=rng,
        with_cache=True,
        **options,
      )

    return jax.jit(
      speculate,
      static_argnames=('draft', 'num_tokens', 'num_draft', 'end', *_OPTIONS),
      donate_argnames='caches',
    )

  @functools.cached_property
  def _sample_recomputing(self):
    def sample(params, tokens, start, rng, *, num_tokens, **options):
      step, cache = self._recomputing(params, start[0])
      return decoding.sample(step, cache, tokens, num_tokens, rng, **options)

    return jax.jit(
      sample,
      static_argnames=('num_tokens', 'end', 'repetition_penalty', *_OPTIONS),
    )

  def _recomputing(self, params, start):
    step, cache = window_step(self._apply, params, self.context_size, start)

    def in_vocabulary(tokens, cache):
      logits, cache = step(tokens, cache)
      return logits[:, : self.vocab_size], cache

    return in_vocabulary, cache

  def _recompute(self, params, rows, rng, options):
    """Generate a piece without a cache."""
    size = self.piece_size
    most = self.context_size - size + 1
    before = [row[-most:] for row in rows]
    # One of a few lengths, so that few programs are compiled.
    length = min(_power(len(before[0])), most)
    tokens, start = align(before, length)
    return self._sample_recomputing(
      params, tokens, start, rng, num_tokens=size, **options
    )

  def lower(self, params):
    """Lower reading half a context and generating a piece, as one program.

    Args:
      params: shapes of the model parameters, with shardings.

    Returns:
      The lowered program and the shapes of its cache.
    """
    size = self.piece_size
    length = _power(max(1, self.context_size // 2))
    length = min(length, self.context_size - size + 1)
    prompt = np.zeros((1, length), np.int32)

    def decode(params, tokens, rng):
      if self.has_cache:
        step, cache = self._last(params), Cache.create(length + size - 1)
      else:
        step, cache = self._recomputing(params, 0)
      chunk = _CHUNK if self.has_cache else None
      return decoding.sample(
        step, cache, tokens, size, rng, chunk_size=chunk, with_cache=True
      )

    rng = jax.eval_shape(jax.random.key, 0)
    lowered = jax.jit(decode).lower(params, prompt, rng)
    return lowered, jax.eval_shape(decode, params, prompt, rng)[1]


class _Writer:
  """Continues rows of tokens with a cache, and with a draft if there is one."""

  def __init__(self, generator, params, num_tokens, draft):
    self._models = [(generator, params)]
    if draft is not None:
      self._models.append((draft.generator, draft.params))
    self._draft = draft
    self._size = generator.piece_size
    # Positions that a piece takes, with proposals beyond its end.
    self._room = self._size + (draft.num_draft if draft else 0)
    self._context_size = min(g.context_size for g, _ in self._models)
    if self._context_size < self._room:
      raise ValueError(
        f'context_size: expected {self._room} or more with a draft, got '
        f'{self._context_size}'
      )
    self._num_tokens = -(-num_tokens // self._size) * self._size
    self._caches = None
    self._capacity = 0
    self._length = 0  # of the longest row, without its last token
    self._surplus = 0  # tokens that the caches hold beyond that

  def write(self, rows, rng, options):
    """Generate a piece, [b, size], of rows that go on after the last one."""
    if self._caches is None or self._length + self._room > self._capacity:
      most = self._context_size - self._room + 1
      self._read([row[-most:] for row in rows])
    (generator, params), *others = self._models
    last = _shard(np.array([row[-1:] for row in rows], np.int32), params)
    inputs = [last, self._caches, np.int32(self._surplus), rng]
    options = options | {'num_tokens': self._size}
    self._length += self._size
    self._surplus = 0
    if not others:
      inputs[1] = self._caches[0]
      piece, cache = generator.sample(params, *inputs, **options)
      self._caches = (cache,)
      return piece
    ((other, other_params),) = others
    piece, accepted, self._caches = generator.speculate(
      params,
      other_params,
      *inputs,
      draft=other,
      num_draft=self._draft.num_draft,
      **options,
    )
    self._draft.accepted.append(float(accepted))
    return piece

  def _read(self, rows):
    """Read all but the last token of each row into new caches."""
    longest = max(map(len, rows))
    size = min(
      self._context_size,
      _power(longest + self._num_tokens + self._room - self._size),
    )
    # A single token is read, and then read again.
    count = max(1, longest - 1)
    chunk = min(_CHUNK, _power(count), size)
    spare = max(_SHORT if chunk <= _SHORT else _CHUNK, self._room)
    tokens, start = align(rows)
    padding = max(0, chunk - count)
    tokens = np.pad(tokens[:, :count], ((0, 0), (0, padding)), mode='edge')
    start = start if start.any() else None
    # The last chunk begins in the one before it, rather than be shorter.
    ends = [*range(chunk, count, chunk), max(count, chunk)]
    self._caches = None  # frees their memory
    self._caches = tuple(
      generator.read(params, tokens, start, ends, chunk, size, spare)
      for generator, params in self._models
    )
    self._capacity = size
    self._length = longest - 1
    self._surplus = max(count, chunk) - self._length


def _over_devices(params) -> NamedSharding | None:
  """The sharding of rows over the devices of a mesh that replicates params."""
  found = getattr(jax.tree.leaves(params)[0], 'sharding', None)
  if not (isinstance(found, NamedSharding) and found.is_fully_replicated):
    return None
  return NamedSharding(found.mesh, PartitionSpec(found.mesh.axis_names))


def _shard(rows, params):
  """Shard rows [b, …] over devices that divide them."""
  over = _over_devices(params)
  if over is None or len(rows) % over.num_devices:
    return rows
  return jax.device_put(rows, over)


def _power(number):
  """Round up to a power of two."""
  return 1 << (number - 1).bit_length()


class Written:
  """The text of a row as its tokens come in, up to where it ends."""

  def __init__(self, decode, tokens, stop=(), end=None):
    """Begin with a prompt.

    Args:
      decode: tokens -> text.
      tokens: of the prompt.
      stop: strings that the text ends before.
      end: the token that it ends before, or several, or None.
    """
    self._decode = decode
    self._tokens = list(tokens)
    self._stop = stop
    self._end = end
    self._begin = self._given = len(decode(self._tokens))
    self.is_done = False

  def add(self, tokens, is_last: bool) -> str:
    """Add tokens; returns the text that is certain since the last call."""
    if self.is_done:
      return ''
    if self._end is not None:
      ends = np.flatnonzero(np.isin(tokens, self._end))
      if len(ends):
        tokens, is_last = tokens[: ends[0]], True
    self._tokens += list(map(int, tokens))
    # Decode with the prompt: some tokenizers drop a leading space.
    text = self._decode(self._tokens)
    found = [text.find(s, self._begin) for s in self._stop]
    found = [at for at in found if at >= 0]
    if found:
      text, is_last = text[: min(found)], True
    elif not is_last:
      text = text.rstrip('\ufffd')  # an incomplete symbol
      text = text[: len(text) - self._held(text)]
    self.is_done = is_last
    new = text[self._given :]
    self._given = max(self._given, len(text))
    return new

  def _held(self, text):
    """The length of the longest end of the text that may begin a stop."""
    new = text[self._begin :]
    return max(
      (n for s in self._stop for n in range(len(s)) if new.endswith(s[:n])),
      default=0,
    )
