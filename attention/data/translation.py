"""Translation data: sentence pairs in batches of similar length."""

import dataclasses
import functools
import hashlib

import numpy as np

from attention.data import dates, tones
from attention.data.files import read_lines
from attention.data.subwords import Subwords
from attention.data.vocabularies import (
  END,
  NUM_SPECIAL,
  PAD,
  START,
  Bytes,
  Framed,
)

ROWS = 8  # batch rows are a multiple of this, so they divide over devices


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
  """Encoded pairs, grouped so that batches have few distinct shapes.

  A bucket holds pairs of similar length, padded to its longest source and
  target.
  """

  sources: list  # [k] int32 including the end, or vectors [k, c] float32
  targets: list  # [t] int32 without start and end
  members: tuple  # indices of the pairs in each bucket
  shapes: tuple  # (source, target with end) length of each bucket
  rows: tuple  # pairs per batch of each bucket
  seed: int

  @classmethod
  def of(
    cls, sources, targets, *, batch_tokens: int, num_buckets: int, seed: int = 0
  ) -> 'Buckets':
    """Group pairs into the buckets that need the least padding.

    Args:
      sources: encoded sources, as the field.
      targets: encoded targets, as the field.
      batch_tokens: positions per batch, of source and target together and
        including padding. A batch has at least 8 pairs.
      num_buckets: maximum number of buckets.
      seed: of the order.
    """
    lengths = np.array(
      [max(len(s), len(t) + 1) for s, t in zip(sources, targets, strict=True)]
    )
    limits = _limits(lengths, num_buckets)
    numbers = np.searchsorted(limits, lengths)
    members = tuple(np.flatnonzero(numbers == n) for n in np.unique(numbers))
    shapes = tuple(
      (
        max(len(sources[i]) for i in bucket),
        max(len(targets[i]) for i in bucket) + 1,
      )
      for bucket in members
    )
    rows = tuple(
      max(ROWS, batch_tokens // sum(s) // ROWS * ROWS) for s in shapes
    )
    return cls(sources, targets, members, shapes, rows, seed)

  @property
  def num_batches(self) -> int:
    """The number of batches per epoch."""
    return sum(
      -(-len(m) // r) for m, r in zip(self.members, self.rows, strict=True)
    )

  @functools.cached_property
  def tokens_per_batch(self) -> float:
    """The mean number of target tokens per batch, without padding."""
    return sum(len(t) + 1 for t in self.targets) / self.num_batches

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def _epoch(self, epoch: int) -> list:
    """The batches of an epoch in order, as (bucket, pair indices)."""
    rng = np.random.default_rng([self.seed, epoch])
    batches = []
    for bucket, (numbers, rows) in enumerate(
      zip(self.members, self.rows, strict=True)
    ):
      # Fill the last batch of a bucket with pairs from its first.
      full = -(-len(numbers) // rows) * rows
      order = np.resize(rng.permutation(numbers), full)
      batches += [(bucket, part) for part in order.reshape(-1, rows)]
    return [batches[i] for i in rng.permutation(len(batches))]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Return training batch `step`, which depends only on (seed, step)."""
    epoch, n = divmod(step, self.num_batches)
    return self._assemble(*self._epoch(epoch)[n])

  def all(self):
    """Yield every pair once: (pair indices, batch padded with empty rows)."""
    for bucket, (numbers, rows) in enumerate(
      zip(self.members, self.rows, strict=True)
    ):
      for start in range(0, len(numbers), rows):
        part = numbers[start : start + rows]
        yield part, self._assemble(bucket, part)

  def _assemble(self, bucket, numbers):
    """Assemble a batch of pairs.

    Returns:
      'source' [rows, k] int32 or [rows, k, c] float32; 'lengths' [rows] int32
      of the sources; 'inputs' [rows, t] int32, start and target; 'targets'
      [rows, t] int32, target and end; 'mask' [rows, t], False at padding.
    """
    rows = self.rows[bucket]
    source_length, target_length = self.shapes[bucket]
    targets = [self.targets[i] for i in numbers]
    source, lengths = pad([self.sources[i] for i in numbers], source_length)
    inputs, _ = pad([np.append(START, t) for t in targets], target_length)
    outputs, counts = pad([np.append(t, END) for t in targets], target_length)
    batch = {
      'source': source,
      'lengths': lengths,
      'inputs': inputs,
      'targets': outputs,
      'mask': np.arange(target_length) < counts[:, None],
    }
    missing = rows - len(numbers)
    return {
      name: np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1))
      for name, x in batch.items()
    }


def _limits(lengths, count: int) -> list[int]:
  """The at most `count` limits that minimise the total padded length."""
  values, numbers = np.unique(lengths, return_counts=True)
  values, below = values.tolist(), [0, *np.cumsum(numbers).tolist()]
  # costs[j]: the least cost of the j shortest values, and its limits.
  costs = [(0, [])] + [(np.inf, [])] * len(values)
  for _ in range(count):
    costs = [
      min(
        (cost + (below[j] - below[i]) * values[j - 1], [*limits, values[j - 1]])
        if i < j
        else (cost, limits)
        for i, (cost, limits) in enumerate(costs[: j + 1])
      )
      for j in range(len(costs))
    ]
  return costs[-1][1]


def pad(
  sequences: list[np.ndarray], length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Right-pad to [n, length, …] int32 or float32; also return lengths [n]."""
  first = sequences[0]
  is_float = np.issubdtype(first.dtype, np.floating)
  padded = np.full(
    (len(sequences), length, *first.shape[1:]),
    0.0 if is_float else PAD,
    np.float32 if is_float else np.int32,
  )
  for row, sequence in zip(padded, sequences, strict=True):
    row[: len(sequence)] = sequence
  return padded, np.array([len(s) for s in sequences], np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Translations:
  """A training corpus with held-out parts."""

  name: str  # source of the corpus
  sha256: str
  vocabulary: Framed
  pairs: dict  # {part: (sources, targets)} before encoding
  train: Buckets
  max_length: int  # maximum tokens of a training source or target
  num_left_out: int  # longer pairs, excluded from training

  @classmethod
  def load(
    cls,
    *,
    path: str = '',
    target_path: str = '',
    validation_path: str = '',
    validation_target_path: str = '',
    embedded: str = 'dates',
    num_pairs: int = 30_000,
    level: str = 'bytes',
    vocab_size: int = 8_000,
    max_length: int = 100,
    batch_tokens: int = 4_096,
    num_buckets: int = 6,
    seed: int = 0,
  ) -> 'Translations':
    """Read two aligned files, or generate an embedded corpus.

    Args:
      path: UTF-8 source text with a sentence per line, plain or gzip; '' for
        the embedded corpus.
      target_path: the translation of `path`, line by line.
      validation_path: held-out source text, in the format of `path`.
      validation_target_path: the translation of `validation_path`.
      embedded: 'dates' or 'tones'; used if `path` is ''.
      num_pairs: number of training pairs of the embedded corpus.
      level: the type of tokens, 'bytes' or 'bpe'.
      vocab_size: maximum size of the BPE vocabulary, which source and target
        share.
      max_length: maximum number of tokens; longer pairs are excluded from
        training.
      batch_tokens: see `Buckets.of`.
      num_buckets: see `Buckets.of`.
      seed: of the generated corpus and of the order of the batches.

    Raises:
      ValueError: If the level or corpus is unknown, or files have different
        numbers of lines, no lines, or are not UTF-8.
      OSError: If a file cannot be read.
    """
    _check(level=level, embedded=embedded, path=path)
    if path:
      parts = {'train': read_pairs(path, target_path)}
      parts['validation'] = read_pairs(validation_path, validation_target_path)
      name = f'{path} → {target_path}'
    else:
      parts, name = _EMBEDDED[embedded](num_pairs, seed), embedded
    sources, targets = parts['train']
    texts = [x for x in sources if isinstance(x, str)] + targets
    vocabulary = Framed(_vocabulary(level, texts, vocab_size))
    encoded = encode_sources(sources, vocabulary), vocabulary.encode(targets)
    kept = [
      (s, t)
      for s, t in zip(*encoded, strict=True)
      if max(len(s), len(t) + 1) <= max_length
    ]
    if not kept:
      raise ValueError(
        f'{name}: expected at least one pair of up to '
        f'data.max_length={max_length} tokens, got none'
      )
    train = Buckets.of(
      *map(list, zip(*kept, strict=True)),
      batch_tokens=batch_tokens,
      num_buckets=num_buckets,
      seed=seed,
    )
    left_out = len(sources) - len(kept)
    sha256 = _hash(parts)
    return cls(name, sha256, vocabulary, parts, train, max_length, left_out)

  def record(self) -> dict:
    """Metadata that identifies the data and is needed to use its models."""
    first = self.train.sources[0]
    return {
      'sha256': self.sha256,
      'vocabulary': self.vocabulary.of.record,
      'max_length': self.max_length,
      'target_length': max(t for _, t in self.train.shapes),
      'frame_size': first.shape[1] if first.ndim == 2 else 0,
    }

  def encode(self, sources: list, targets: list) -> Buckets:
    """Encode held-out pairs; see `encode`."""
    return encode(sources, targets, self.vocabulary)


def encode(sources: list, targets: list, vocabulary) -> Buckets:
  """Encode held-out pairs, for iteration with `Buckets.all`."""
  return Buckets.of(
    encode_sources(sources, vocabulary),
    vocabulary.encode(targets),
    batch_tokens=4_096,
    num_buckets=3,
  )


def encode_sources(sources: list, vocabulary) -> list[np.ndarray]:
  """Encode texts with an end token appended; vectors are unchanged."""
  if sources and not isinstance(sources[0], str):
    return sources
  return [np.append(s, END) for s in vocabulary.encode(sources)]


def read_pairs(path: str, target_path: str) -> tuple[list[str], list[str]]:
  """Read the lines of two aligned files.

  Raises:
    ValueError: If a path is empty, or the files have different numbers of
      lines, no lines, or are not UTF-8.
    OSError: If a file cannot be read.
  """
  if not path or not target_path:
    raise ValueError(
      f'{path or target_path or "data.validation_path"}: expected two aligned '
      'files for training and two for validation: set data.path, '
      'data.target_path, data.validation_path, data.validation_target_path'
    )
  sources, targets = read_lines(path), read_lines(target_path)
  if len(sources) != len(targets):
    raise ValueError(
      f'{target_path}: expected {len(sources)} lines to match {path}, got '
      f'{len(targets)}'
    )
  if not sources:
    raise ValueError(f'{path}: the file is empty')
  return sources, targets


def _embedded_dates(count, seed):
  held_out = min(count, 1_000)
  sizes = {'train': count, 'validation': held_out, 'unseen': held_out}
  made = {part: dates.pairs(part, n, seed) for part, n in sizes.items()}
  return {p: tuple(map(list, zip(*m, strict=True))) for p, m in made.items()}


def _embedded_tones(count, seed):
  sizes = {'train': count, 'validation': min(count, 500)}
  return {part: tones.pairs(part, n, seed) for part, n in sizes.items()}


_EMBEDDED = {'dates': _embedded_dates, 'tones': _embedded_tones}


def _check(level, embedded, path):
  if level not in ('bytes', 'bpe'):
    raise ValueError(f"data.level: expected 'bytes' or 'bpe', got {level!r}")
  if not path and embedded not in _EMBEDDED:
    raise ValueError(
      f'data.embedded: expected one of {sorted(_EMBEDDED)}, got {embedded!r}'
    )


def _vocabulary(level, texts, vocab_size):
  if level == 'bytes':
    return Bytes()
  return Subwords.learn(
    texts, vocab_size, num_special=NUM_SPECIAL, add_prefix_space=True
  )


def _hash(parts) -> str:
  digest = hashlib.sha256()
  for part in parts.values():
    for sequence in part:
      for x in sequence:
        digest.update(x.encode() + b'\n' if isinstance(x, str) else x.tobytes())
  return digest.hexdigest()
