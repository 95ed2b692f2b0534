"""Pairs of sentences, in batches of like length."""

import dataclasses
import functools
import gzip
import hashlib
import pathlib

import numpy as np

from attention.data import dates, tones
from attention.data.subwords import Subwords
from attention.data.vocabularies import (
  END,
  NUM_SPECIAL,
  PAD,
  START,
  Bytes,
  Framed,
)

ROWS = 8  # rows of a batch are a multiple, so that devices can share them


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
  """Encoded pairs, sorted into few shapes.

  Pairs of like length make a bucket, padded to its longest source and target.
  """

  sources: list  # [k] int32 with the end, or vectors [k, c] float32
  targets: list  # [t] int32, without start and end
  members: tuple  # of each bucket: numbers of its pairs
  shapes: tuple  # of each bucket: longest source, longest target with end
  rows: tuple  # of each bucket: pairs in a batch
  seed: int

  @classmethod
  def of(
    cls, sources, targets, *, batch_tokens: int, num_buckets: int, seed: int = 0
  ) -> 'Buckets':
    """Sorts pairs into buckets that need the least padding.

    Args:
      sources: see above.
      targets: see above.
      batch_tokens: positions in a batch, of source and target together, with
        padding; a batch has at least 8 pairs.
      num_buckets: how many shapes, at most.
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
    """Batches in an epoch."""
    return sum(
      -(-len(m) // r) for m, r in zip(self.members, self.rows, strict=True)
    )

  @functools.cached_property
  def tokens_per_batch(self) -> float:
    """Tokens of the target in a batch, on average, without padding."""
    return sum(len(t) + 1 for t in self.targets) / self.num_batches

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def _epoch(self, epoch: int) -> list:
    """The epoch's batches, (bucket, numbers of pairs), in their order."""
    rng = np.random.default_rng([self.seed, epoch])
    batches = []
    for bucket, (numbers, rows) in enumerate(
      zip(self.members, self.rows, strict=True)
    ):
      # What a last batch lacks is repeated from the bucket's first.
      full = -(-len(numbers) // rows) * rows
      order = np.resize(rng.permutation(numbers), full)
      batches += [(bucket, part) for part in order.reshape(-1, rows)]
    return [batches[i] for i in rng.permutation(len(batches))]

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Training batch `step`, a function of (seed, step) alone."""
    epoch, n = divmod(step, self.num_batches)
    return self._assemble(*self._epoch(epoch)[n])

  def all(self):
    """Every pair once: (numbers of the pairs, batch padded with empty rows)."""
    for bucket, (numbers, rows) in enumerate(
      zip(self.members, self.rows, strict=True)
    ):
      for start in range(0, len(numbers), rows):
        part = numbers[start : start + rows]
        yield part, self._assemble(bucket, part)

  def _assemble(self, bucket, numbers):
    """A batch of those pairs.

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
  """At most `count` limits with the least sum of each length's next limit."""
  values, numbers = np.unique(lengths, return_counts=True)
  values, below = values.tolist(), [0, *np.cumsum(numbers).tolist()]
  # costs[j]: of the j shortest values, and the limits that give it.
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
  """[n, length, …] in int32 or float32, padded behind, and the lengths [n]."""
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
  """A corpus to train on, and parts that are held out."""

  name: str  # where it came from
  sha256: str
  vocabulary: Framed
  pairs: dict  # part ('train', 'validation', …): (sources, targets), as read
  train: Buckets
  max_length: int  # tokens of a source or target in it
  num_left_out: int  # pairs that are longer

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
    """Reads two aligned files, or makes up an embedded corpus.

    Args:
      path: UTF-8 text, a sentence a line, plain or gzip; '' for the embedded.
      target_path: its translation, line by line.
      validation_path: as path, held out.
      validation_target_path: its translation.
      embedded: 'dates' or 'tones', where path is ''.
      num_pairs: to train on, of the embedded corpus.
      level: 'bytes' or 'bpe': what a token is.
      vocab_size: of the BPE, which source and target share.
      max_length: longer pairs, in tokens, are left out of training.
      batch_tokens: see `Buckets.of`.
      num_buckets: see `Buckets.of`.
      seed: of the batches' order.

    Raises:
      ValueError: an unknown level or corpus; files of different line counts,
        without lines or not UTF-8.
      OSError: a file that can't be read.
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
    vocabulary = Framed(_pieces(level, texts, vocab_size))
    encoded = encode_sources(sources, vocabulary), vocabulary.encode(targets)
    kept = [
      (s, t)
      for s, t in zip(*encoded, strict=True)
      if max(len(s), len(t) + 1) <= max_length
    ]
    if not kept:
      raise ValueError(
        f'{name}: no pair has at most data.max_length={max_length} tokens'
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
    """What identifies the data, and what is needed to use a model of it."""
    first = self.train.sources[0]
    return {
      'sha256': self.sha256,
      'vocabulary': self.vocabulary.of.record,
      'max_length': self.max_length,
      'target_length': max(t for _, t in self.train.shapes),
      'frame_size': first.shape[1] if first.ndim == 2 else 0,
    }

  def encode(self, sources: list, targets: list) -> Buckets:
    """See `encode`."""
    return encode(sources, targets, self.vocabulary)


def encode(sources: list, targets: list, vocabulary) -> Buckets:
  """Pairs that are held out, to be gone through with `Buckets.all`."""
  return Buckets.of(
    encode_sources(sources, vocabulary),
    vocabulary.encode(targets),
    batch_tokens=4_096,
    num_buckets=3,
  )


def encode_sources(sources: list, vocabulary) -> list[np.ndarray]:
  """Texts as tokens with the end behind them; vectors stay as they are."""
  if sources and not isinstance(sources[0], str):
    return sources
  return [np.append(s, END) for s in vocabulary.encode(sources)]


def read_pairs(path: str, target_path: str) -> tuple[list[str], list[str]]:
  """The lines of two aligned files.

  Raises:
    ValueError: no second file, different line counts, no lines, not UTF-8.
    OSError: a file that can't be read.
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
      f'{target_path}: expected as many lines as {path} has, {len(sources)}, '
      f'got {len(targets)}'
    )
  if not sources:
    raise ValueError(f'{path}: the file is empty')
  return sources, targets


def read_lines(path: str) -> list[str]:
  """Lines of a UTF-8 file, plain or gzip.

  Raises:
    ValueError: not UTF-8 (says the line), or a damaged gzip file.
    OSError: it can't be read.
  """
  content = pathlib.Path(path).read_bytes()
  if content.startswith(b'\x1f\x8b'):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError) as error:
      raise ValueError(f'{path}: damaged gzip file: {error}') from None
  lines = content.split(b'\n')
  if not lines[-1]:
    lines.pop()
  texts = []
  for number, line in enumerate(lines, 1):
    try:
      texts.append(line.decode().rstrip('\r'))
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path}: line {number}: not UTF-8 at byte {error.start} '
        f'(0x{line[error.start]:02x}); convert it, or point at another file'
      ) from None
  return texts


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


def _pieces(level, texts, vocab_size):
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
