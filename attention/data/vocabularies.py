"""Vocabularies: text as tokens, and as tokens between start and end."""

import dataclasses

import numpy as np

from attention.data.subwords import Subwords

PAD, START, END = range(3)
NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Characters:
  """The symbols of a text, numbered in order of their code points."""

  symbols: str

  @property
  def record(self) -> str:
    """What it can be made from again."""
    return self.symbols

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
    return ''.join(self.pieces(tokens))

  def pieces(self, tokens) -> list[str]:
    """What each token stands for, to label pictures with."""
    return [self.symbols[int(t)] for t in tokens]


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes: 256 tokens, any text."""

  size = 256
  record = None

  def encode(self, text: str) -> np.ndarray:
    """Token ids [t] int32."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  def decode(self, tokens) -> str:
    """The text of tokens; U+FFFD where bytes are no symbol."""
    return bytes(int(t) for t in tokens).decode(errors='replace')

  def pieces(self, tokens) -> list[str]:
    """What each token stands for, to label pictures with: as Latin-1."""
    return [chr(t) for t in tokens]


@dataclasses.dataclass(frozen=True)
class Framed:
  """Another vocabulary's tokens behind padding, start and end."""

  of: Bytes | Subwords

  @property
  def size(self) -> int:
    return self.of.size + NUM_SPECIAL

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids [t] int32 of each text, without start and end."""
    return [tokens + NUM_SPECIAL for tokens in self.of.encode_batch(texts)]

  def decode(self, tokens) -> str:
    """The text of tokens up to the first end, without spaces at its ends."""
    return self.of.decode(_content(tokens)).strip()

  def pieces(self, tokens) -> list[str]:
    """What each token up to the end stands for."""
    return self.of.pieces(_content(tokens))


def _content(tokens):
  tokens = np.asarray(tokens)
  ends = np.flatnonzero(tokens == END)
  tokens = tokens[: ends[0]] if len(ends) else tokens
  return tokens[tokens >= NUM_SPECIAL] - NUM_SPECIAL


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
