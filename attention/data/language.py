"""Language modelling data: a tokenised text and batches of its windows."""

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig

import grain
import numpy as np

from attention.data.files import read_text
from attention.data.subwords import Subwords, cut
from attention.data.vocabularies import Bytes, Characters

_STANDARD_LIBRARY = "the Python standard library's own source"


@dataclasses.dataclass(frozen=True)
class Text:
  """A tokenised text: the first 90% for training, the rest for validation."""

  name: str  # source of the text
  sha256: str
  vocabulary: Characters | Bytes | Subwords
  tokens: np.ndarray  # [n] int32
  context_size: int  # tokens per window
  batch_size: int  # windows per batch
  seed: int

  @classmethod
  def load(
    cls,
    *,
    path: str = '',
    level: str = 'characters',
    vocab_size: int = 1_024,
    context_size: int,
    batch_size: int,
    seed: int = 0,
    record: dict | None = None,
    vocabulary: Characters | Bytes | Subwords | None = None,
  ) -> 'Text':
    """Load and tokenise a text.

    Args:
      path: a UTF-8 file; '' for the Python standard library's own source.
      level: the type of tokens: 'characters', 'bytes', 'bpe' (subwords learnt
        from the first 90% of the text), or the path of a tokenizer.json.
      vocab_size: maximum vocabulary size of 'bpe'.
      context_size: tokens per window.
      batch_size: windows per batch.
      seed: of the order of the windows.
      record: the recorded 'sha256' and 'vocabulary' of a text at this level. If
        the hash matches, the recorded vocabulary is reused.
      vocabulary: a vocabulary to use, whatever `level` and `record` are.

    Raises:
      ValueError: If the level is unknown; the file is empty, not UTF-8 or too
        short for one window; `vocab_size` is too small; the tokenizer is lossy;
        or `tokenizers` is not installed.
      OSError: If a file cannot be read.
    """
    text = read_text(path) if path else standard_library()
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    for key, count in (
      ('context_size', context_size),
      ('batch_size', batch_size),
    ):
      if count < 1:
        raise ValueError(f'data.{key}: expected 1 or more, got {count}')
    origin = f'data.level: {level}'
    if vocabulary is not None:
      origin = f"{path or _STANDARD_LIBRARY}, in the model's vocabulary"
    elif record and record['sha256'] == sha256:
      vocabulary = recorded(level, record['vocabulary'])
    else:
      vocabulary = _learn(level, text, vocab_size)
    try:
      tokens = vocabulary.encode(text)
    except ValueError as error:
      raise ValueError(f'{origin}: {error}') from None
    data = cls(
      name=path or _STANDARD_LIBRARY,
      sha256=sha256,
      vocabulary=vocabulary,
      tokens=tokens,
      context_size=context_size,
      batch_size=batch_size,
      seed=seed,
    )
    if len(data.train) <= context_size or len(data.validation) < 2:
      raise ValueError(
        f'{data.name}: {len(data.tokens)} tokens are too few for '
        f'context_size={context_size}: 90% of them, {len(data.train)}, must '
        'hold one window and the token after it'
      )
    return data

  @property
  def train(self) -> np.ndarray:
    return self.tokens[: len(self.tokens) * 9 // 10]

  @property
  def validation(self) -> np.ndarray:
    return self.tokens[len(self.tokens) * 9 // 10 :]

  @functools.cached_property
  def validation_bytes(self) -> int:
    """UTF-8 bytes of all validation targets, except for split symbols."""
    return len(self.vocabulary.decode(self.validation[1:]).encode())

  @functools.cached_property
  def _batches(self):
    train, width = self.train, self.context_size + 1
    return (
      grain.MapDataset.range(len(train) - self.context_size)
      .shuffle(seed=self.seed)
      .repeat()
      .map(lambda start: train[start : start + width])
      .batch(self.batch_size)
    )

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Return training batch `step`, which depends only on (seed, step).

    Returns:
      'tokens' and 'targets' [batch_size, context_size] int32: random windows of
      the text, and the same windows shifted by one token.
    """
    windows = self._batches[step]
    return {'tokens': windows[:, :-1], 'targets': windows[:, 1:]}

  def validation_batches(self, batch_size: int):
    """Iterate over the validation part in order, with each target once.

    Yields:
      'tokens' and 'targets' [batch_size, context_size] int32, and 'mask', which
      is False at the padding after the last token.
    """
    tokens = self.validation
    shape = (-1, batch_size, self.context_size)
    size = batch_size * self.context_size
    count = len(tokens) - 1
    padding = (0, -count % size)
    parts = {
      'tokens': np.pad(tokens[:-1], padding).reshape(shape),
      'targets': np.pad(tokens[1:], padding).reshape(shape),
      'mask': np.pad(np.ones(count, bool), padding).reshape(shape),
    }
    for i in range(len(parts['mask'])):
      yield {name: part[i] for name, part in parts.items()}


def sliding_batches(
  tokens: np.ndarray, context_size: int, batch_size: int, num_prefix: int = 0
):
  """Iterate over a text with overlapping windows, with each target once.

  Windows advance by half their length, so that every target follows at least
  half a context, or all there is.

  Args:
    tokens: [n] ints.
    context_size: tokens per window, above num_prefix.
    batch_size: windows per batch.
    num_prefix: number of tokens at the start that every window starts with.

  Yields:
    'tokens' and 'targets' [batch_size, context_size] int32, and 'mask', which
    is True at the targets that count.
  """
  prefix, text = np.split(tokens, [num_prefix])
  room = context_size + 1 - num_prefix  # with the last target
  stride = max(1, room // 2)
  count = 1 + max(0, -(-(len(text) - room) // stride))
  scored = 0 if num_prefix else 1
  rows = []
  for start in range(0, count * stride, stride):
    part = text[start : start + room]
    row = np.concatenate([prefix, part])
    mask = np.arange(len(row)) >= num_prefix + scored - start
    scored = start + room
    padding = (0, context_size + 1 - len(row))
    row, mask = np.pad(row, padding), np.pad(mask, padding)
    rows.append(
      {'tokens': row[:-1], 'targets': row[1:], 'mask': mask[1:]},
    )
  blank = {name: np.zeros_like(x) for name, x in rows[0].items()}
  rows += [blank] * (-len(rows) % batch_size)
  for i in range(0, len(rows), batch_size):
    part = rows[i : i + batch_size]
    yield {name: np.stack([row[name] for row in part]) for name in blank}


def recorded(level: str, vocabulary: str | None):
  """Restore a vocabulary of the given level from the record of a run."""
  if level == 'bytes':
    return Bytes()
  return (Characters if level == 'characters' else Subwords)(vocabulary)


def given(level: str) -> Bytes | Subwords:
  """The vocabulary 'bytes', or that of the path of a tokenizer.json."""
  return Bytes() if level == 'bytes' else Subwords(read_text(level))


def _learn(level, text, vocab_size):
  if level == 'bpe':
    return Subwords.learn(cut(text[: len(text) * 9 // 10]), vocab_size)
  if level == 'characters':
    return Characters.of(text)
  if level == 'bytes' or level.endswith('.json'):
    return given(level)
  raise ValueError(
    "data.level: expected one of ['bpe', 'bytes', 'characters'], or the path "
    f'of a tokenizer.json, got {level!r}'
  )


def standard_library() -> str:
  """Concatenate the top-level ASCII modules of the running Python.

  This text is available on every machine but depends on the Python version. Use
  it for demonstrations, not for benchmarks.
  """
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  sources = [p.read_bytes() for p in sorted(folder.glob('*.py'))]
  text = '\n'.join(s.decode() for s in sources if s.isascii())
  if not text:
    raise ValueError(
      f'{folder}: this Python installation has no source files; pass '
      '--config.data.path=FILE'
    )
  return text
