"""Text as tokens: characters or bytes, and windows of them in batches."""

import dataclasses
import functools
import hashlib
import pathlib
import sysconfig

import grain
import numpy as np

_STANDARD_LIBRARY = "the Python standard library's own source"


@dataclasses.dataclass(frozen=True)
class Characters:
  """The symbols of a text, numbered in order of their code points."""

  symbols: str

  @classmethod
  def of(cls, text: str) -> 'Characters':
    return cls(''.join(sorted(set(text))))

  @property
  def size(self) -> int:
    return len(self.symbols)

  def encode(self, text: str) -> np.ndarray:
    """Token ids [t] int32.

    Raises:
      ValueError: a symbol that the vocabulary doesn't have.
    """
    known = _code_points(self.symbols)
    points = _code_points(text)
    tokens = np.minimum(np.searchsorted(known, points), len(known) - 1)
    strange = points[known[tokens] != points]
    if len(strange):
      symbols = ''.join(map(chr, sorted(set(strange.tolist()))))
      raise ValueError(
        f'symbols {symbols!r} are not among the {self.size} that the model '
        'has seen'
      )
    return tokens.astype(np.int32)

  def decode(self, tokens) -> str:
    return ''.join(self.symbols[int(t)] for t in tokens)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes: 256 tokens, any text."""

  size = 256

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens) -> str:
    return bytes(int(t) for t in tokens).decode(errors='replace')


@dataclasses.dataclass(frozen=True)
class Text:
  """A text in tokens: the first 90% to train on, the rest to validate on."""

  name: str  # where it came from
  sha256: str
  vocabulary: Characters | Bytes
  tokens: np.ndarray  # [n] int32
  context_size: int  # tokens in a window
  batch_size: int  # windows in a batch
  seed: int

  @classmethod
  def load(
    cls,
    *,
    path: str = '',
    level: str = 'characters',
    context_size: int,
    batch_size: int,
    seed: int = 0,
  ) -> 'Text':
    """Reads a text.

    Args:
      path: a UTF-8 file; '' for the Python standard library's own source.
      level: 'characters' or 'bytes': what a token is.
      context_size: tokens in a window.
      batch_size: windows in a batch.
      seed: of the order of the windows.

    Raises:
      ValueError: an unknown level; an empty file, one that isn't UTF-8, or
        one too short for a window.
      OSError: a file that can't be read.
    """
    text = read_text(path) if path else standard_library()
    levels = {'characters': Characters.of, 'bytes': lambda _: Bytes()}
    if level not in levels:
      raise ValueError(
        f'data.level: expected one of {sorted(levels)}, got {level!r}'
      )
    for key, count in (
      ('context_size', context_size),
      ('batch_size', batch_size),
    ):
      if count < 1:
        raise ValueError(f'data.{key}: expected 1 or more, got {count}')
    vocabulary = levels[level](text)
    data = cls(
      name=path or _STANDARD_LIBRARY,
      sha256=hashlib.sha256(text.encode()).hexdigest(),
      vocabulary=vocabulary,
      tokens=vocabulary.encode(text),
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
    """Training batch `step`, a function of (seed, step) alone.

    Returns:
      'tokens' and 'targets' [batch_size, context_size] int32: a window from
      anywhere in the text, and the same one token on.
    """
    windows = self._batches[step]
    return {'tokens': windows[:, :-1], 'targets': windows[:, 1:]}

  def validation_batches(self, batch_size: int):
    """The whole validation part, in order, each token a target once.

    Yields:
      'tokens', 'targets' [batch_size, context_size] int32 and 'mask', False
      at the padding behind the last token.
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


def read_text(path: str) -> str:
  """A UTF-8 file's text.

  Raises:
    ValueError: empty, or not UTF-8 (says the byte offset).
    OSError: it can't be read.
  """
  content = pathlib.Path(path).read_bytes()
  if not content:
    raise ValueError(f'{path}: the file is empty')
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}: not UTF-8 at byte {error.start} '
      f'(0x{content[error.start]:02x}); convert it, or point at another file'
    ) from None


def standard_library() -> str:
  """The top-level modules of the running Python, those in plain ASCII.

  A text that every machine has. It differs by Python version: something to
  see a model learn, not a benchmark.
  """
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  sources = [p.read_bytes() for p in sorted(folder.glob('*.py'))]
  text = '\n'.join(s.decode() for s in sources if s.isascii())
  if not text:
    raise ValueError(
      f'{folder}: this Python comes without its source; pass '
      '--config.data.path=FILE'
    )
  return text


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
