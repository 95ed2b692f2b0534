"""Vocabularies of translation: text as tokens behind padding, start and end."""

import dataclasses
import functools

import numpy as np

PAD, START, END = range(3)
_NUM_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class Utf8:
  """UTF-8 bytes: any text, nothing to learn."""

  size = 256 + _NUM_SPECIAL

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids [t] int32 of each text, without start and end."""
    bytes_of = (np.frombuffer(text.encode(), np.uint8) for text in texts)
    return [b.astype(np.int32) + _NUM_SPECIAL for b in bytes_of]

  def decode(self, tokens) -> str:
    """The text of tokens up to the first end."""
    return bytes(_content(tokens).tolist()).decode(errors='replace')

  def pieces(self, tokens) -> list[str]:
    """What each token stands for, to label pictures with."""
    return [bytes([t]).decode('latin-1') for t in _content(tokens).tolist()]


@dataclasses.dataclass(frozen=True)
class Bpe:
  """Byte-pair encoding (Sennrich et al. 2016) of UTF-8 bytes.

  Lossless: decoding gives the very text, but for spaces at its ends.
  """

  json: str  # as `tokenizers` writes it

  @classmethod
  def train(cls, texts: list[str], size: int) -> 'Bpe':
    """Learns the pieces that texts are best made of.

    Args:
      texts: to learn from.
      size: of the vocabulary, at most.

    Raises:
      ValueError: a size below that of the bytes alone; no `tokenizers`.
    """
    least = Utf8.size
    if size < least:
      raise ValueError(
        f'data.vocab_size: expected {least} or more, got {size}: all bytes, '
        'padding, start and end'
      )
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=size - _NUM_SPECIAL,
      initial_alphabet=sorted(split.alphabet()),
      show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer.to_str())

  @functools.cached_property
  def _tokenizer(self):
    return _library().Tokenizer.from_str(self.json)

  @property
  def size(self) -> int:
    return self._tokenizer.get_vocab_size() + _NUM_SPECIAL

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    encoded = self._tokenizer.encode_batch(texts)
    return [np.array(e.ids, np.int32) + _NUM_SPECIAL for e in encoded]

  def decode(self, tokens) -> str:
    return self._tokenizer.decode(_content(tokens).tolist()).strip()

  def pieces(self, tokens) -> list[str]:
    return [self._tokenizer.decode([t]) for t in _content(tokens).tolist()]


def _content(tokens):
  tokens = np.asarray(tokens)
  ends = np.flatnonzero(tokens == END)
  tokens = tokens[: ends[0]] if len(ends) else tokens
  return tokens[tokens >= _NUM_SPECIAL] - _NUM_SPECIAL


def _library():
  try:
    import tokenizers
  except ImportError:
    raise ValueError("BPE needs tokenizers: pip install -e '.[data]'") from None
  return tokenizers
