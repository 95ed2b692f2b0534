"""Text as pieces of words: learnt from it, or those of a tokenizer.json."""

import dataclasses
import functools
import json
import re

import numpy as np

_NUM_BYTES = 256
# No word of GPT-2's pattern extends over such a place: what is on either side
# has the same tokens apart as together.
_BOUNDARY = re.compile(r'(?<=[\w!-~])(?=[ \n])')


@dataclasses.dataclass(frozen=True)
class Subwords:
  """The tokens of a tokenizer in the format of Hugging Face's tokenizers."""

  json: str  # content of a tokenizer.json

  @property
  def record(self) -> str:
    """What it can be made from again."""
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
    """Byte-pair encoding (Sennrich et al. 2016) of UTF-8 bytes.

    Words are cut as GPT-2's are (Radford et al. 2019). Every text can be
    encoded, and decodes to itself; with `add_prefix_space`, behind a space.

    Args:
      texts: to learn from.
      size: of the vocabulary, at most.
      num_special: tokens that the caller adds, of which `size` is to hold too.
      add_prefix_space: whether a first word is encoded as one inside a text.

    Raises:
      ValueError: a size below that of the bytes alone; no `tokenizers`.
    """
    least = _NUM_BYTES + num_special
    if size < least:
      special = f' and {num_special} special tokens' if num_special else ''
      raise ValueError(
        f'data.vocab_size: expected {least} or more, got {size}: there are '
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
    """How many ids there are, from 0 to the largest."""
    return max(self._tokenizer.get_vocab().values(), default=-1) + 1

  @functools.cached_property
  def _is_separable(self):
    """Whether what `_BOUNDARY` separates may be encoded apart."""
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
    """Token ids [t] int32, without what a tokenizer adds at the ends.

    Raises:
      ValueError: not a tokenizer, or one that loses some of the text.
    """
    text.encode()  # raises where a half of a surrogate pair stands alone
    parts = [text]
    if self._is_separable:
      # Most of a long text are parts that it has many times.
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
        f'the tokenizer does not keep the text: {text[at : at + 20]!r} at '
        f'character {at:,} comes back as {again[at : at + 20]!r}'
      )
    return tokens

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, whether or not they keep it."""
    encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) for e in encoded]

  def decode(self, tokens) -> str:
    """The text of tokens; U+FFFD where bytes are no symbol."""
    tokens = np.asarray(tokens).tolist()
    return self._tokenizer.decode(tokens, skip_special_tokens=False)

  def pieces(self, tokens) -> list[str]:
    """What each token stands for, to label pictures with."""
    return [self.decode([token]) for token in tokens]


def cut(text: str) -> list[str]:
  """Parts of a text to learn from at once, none of which divides a word."""
  return _BOUNDARY.split(text)


def _library():
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      "subwords need tokenizers: pip install -e '.[data]'"
    ) from None
  return tokenizers
