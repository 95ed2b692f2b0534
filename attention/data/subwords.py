"""Subword vocabularies, learnt from texts or read from a tokenizer.json."""

import dataclasses
import functools
import json
import re

import numpy as np

_NUM_BYTES = 256
# Words of GPT-2's pattern never span such a boundary, so the parts on either
# side can be encoded separately with the same result.
_BOUNDARY = re.compile(r'(?<=[\w!-~])(?=[ \n])')


@dataclasses.dataclass(frozen=True)
class Subwords:
  """A vocabulary in the format of Hugging Face tokenizers."""

  json: str  # content of tokenizer.json

  @property
  def record(self) -> str:
    """The state from which the vocabulary can be restored."""
    return self.json

  @classmethod
  def learn(
    cls,
    texts: list[str],
    size: int,
    *,
    num_special: int = 0,
    add_prefix_space: bool = False,
  ) -> 'Subwords':
    """Learn a byte-pair encoding (Sennrich et al. 2016) of UTF-8 bytes.

    Texts are split into words as in GPT-2 (Radford et al. 2019). Any text can
    be encoded and is decoded unchanged, except that `add_prefix_space` adds a
    leading space.

    Args:
      texts: training texts.
      size: maximum vocabulary size.
      num_special: number of special tokens that the caller adds; they count
        towards `size`.
      add_prefix_space: whether to encode the first word of a text like a word
        within it.

    Raises:
      ValueError: If `size` cannot hold all bytes and special tokens, or
        `tokenizers` is not installed.
    """
    least = _NUM_BYTES + num_special
    if size < least:
      special = f' and {num_special} special tokens' if num_special else ''
      raise ValueError(
        f'data.vocab_size: expected {least} or more, got {size}; it must hold '
        f'{_NUM_BYTES} bytes{special}'
      )
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=size - num_special,
      initial_alphabet=sorted(words.alphabet()),
      show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer.to_str())

  @functools.cached_property
  def _tokenizer(self):
    library = _library()
    try:
      tokenizer = library.Tokenizer.from_str(self.json)
    except Exception as error:
      raise ValueError(f'not a tokenizer.json: {error}') from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  @functools.cached_property
  def size(self) -> int:
    """The number of ids from 0 to the largest."""
    return max(self._tokenizer.get_vocab().values(), default=-1) + 1

  @functools.cached_property
  def prefix(self) -> tuple[int, ...]:
    """The special tokens that texts start with, such as <bos>."""
    plain, framed = (
      self._tokenizer.encode('a', add_special_tokens=special).ids
      for special in (False, True)
    )
    for start in range(len(framed) - len(plain) + 1):
      if framed[start : start + len(plain)] == plain:
        return tuple(framed[:start])
    return ()

  @functools.cached_property
  def _is_separable(self):
    """Whether parts split at `_BOUNDARY` can be encoded separately."""
    record = json.loads(self._tokenizer.to_str())
    words = record['pre_tokenizer'] or {}
    return (
      words.get('type') == 'ByteLevel'
      and words['use_regex']
      and not words['add_prefix_space']
      and record['normalizer'] is None
      and not any(
        token['lstrip']
        or token['rstrip']
        or token['single_word']
        or _BOUNDARY.search(token['content'])
        for token in record['added_tokens']
      )
    )

  def encode(self, text: str) -> np.ndarray:
    """Encode a text as ids [t] int32, without special tokens at the ends.

    Raises:
      ValueError: If `json` is not a valid tokenizer or the tokenizer is lossy
        for this text.
    """
    text.encode()  # raises on lone surrogates
    parts = [text]
    if self._is_separable:
      # Most parts of a long text repeat, so encode each only once.
      parts = _BOUNDARY.split(text)
    unique = list(dict.fromkeys(parts))
    known = dict(zip(unique, self.encode_batch(unique), strict=True))
    tokens = np.concatenate([known[part] for part in parts])
    if (again := self.decode(tokens)) != text:
      pairs = enumerate(zip(text, again, strict=False))
      at = next(
        (i for i, (a, b) in pairs if a != b), min(len(text), len(again))
      )
      raise ValueError(
        f'the tokenizer is lossy: {text[at : at + 20]!r} at character {at:,} '
        f'decodes to {again[at : at + 20]!r}'
      )
    return tokens

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    """Encode each text, without checking that its ids decode to it."""
    encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, tokens) -> str:
    """Decode tokens to a text; invalid UTF-8 becomes U+FFFD."""
    tokens = np.asarray(tokens).tolist()
    return self._tokenizer.decode(tokens, skip_special_tokens=False)

  def pieces(self, tokens) -> list[str]:
    """The text of each token, for labels in plots."""
    return [self.decode([token]) for token in tokens]


def cut(text: str) -> list[str]:
  """Split a text into parts for training, without splitting words."""
  return _BOUNDARY.split(text)


def _library():
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      "subwords require tokenizers: pip install -e '.[data]'"
    ) from None
  return tokenizers
