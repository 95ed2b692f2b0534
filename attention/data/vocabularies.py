"""Vocabularies of characters and bytes, and one with special tokens."""

import dataclasses

import numpy as np

from attention.data.subwords import Subwords

PAD, START, END = range(3)
NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Characters:
  """The symbols of a text, numbered by code point."""

  symbols: str

  @property
  def record(self) -> str:
    """The state from which the vocabulary can be restored."""
    return self.symbols

  @classmethod
  def of(cls, text: str) -> 'Characters':
    return cls(''.join(sorted(set(text))))

  @property
  def size(self) -> int:
    return len(self.symbols)

  def encode(self, text: str) -> np.ndarray:
    """Encode a text as ids [t] int32.

    Raises:
      ValueError: If the text has a symbol outside the vocabulary.
    """
    known = _code_points(self.symbols)
    points = _code_points(text)
    beyond = known.max(initial=0) + 1
    table = np.full(beyond + 1, -1, np.int32)
    table[known] = np.arange(len(known))
    tokens = table[np.minimum(points, beyond)]
    unknown = points[tokens < 0]
    if len(unknown):
      symbols = ''.join(map(chr, sorted(set(unknown.tolist()))))
      raise ValueError(
        f'symbols {symbols!r} are not in the vocabulary of {self.size} '
        'training symbols'
      )
    return tokens

  def decode(self, tokens) -> str:
    return ''.join(self.pieces(tokens))

  def pieces(self, tokens) -> list[str]:
    """The text of each token, for labels in plots."""
    return [self.symbols[int(t)] for t in tokens]


@dataclasses.dataclass(frozen=True)
class Bytes:
  """The 256 UTF-8 bytes; any text can be encoded."""

  size = 256
  record = None

  def encode(self, text: str) -> np.ndarray:
    """Encode a text as ids [t] int32."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, tokens) -> str:
    """Decode tokens to a text; invalid UTF-8 becomes U+FFFD."""
    return bytes(int(t) for t in tokens).decode(errors='replace')

  def pieces(self, tokens) -> list[str]:
    """Each byte as a Latin-1 character, for labels in plots."""
    return [chr(t) for t in tokens]


@dataclasses.dataclass(frozen=True)
class Framed:
  """A vocabulary with ids for padding, start and end added in front."""

  of: Bytes | Subwords

  @property
  def size(self) -> int:
    return self.of.size + NUM_SPECIAL

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Encode each text as ids [t] int32, without start and end."""
    return [tokens + NUM_SPECIAL for tokens in self.of.encode_batch(texts)]

  def decode(self, tokens) -> str:
    """Decode tokens up to the first end, and strip surrounding whitespace."""
    return self.of.decode(_strip_special(tokens)).strip()

  def pieces(self, tokens) -> list[str]:
    """The text of each token up to the first end."""
    return self.of.pieces(_strip_special(tokens))


def _strip_special(tokens):
  tokens = np.asarray(tokens)
  ends = np.flatnonzero(tokens == END)
  tokens = tokens[: ends[0]] if len(ends) else tokens
  return tokens[tokens >= NUM_SPECIAL] - NUM_SPECIAL


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
