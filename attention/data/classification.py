"""Sequences with a class: digits as patches, texts in folders or a table."""

import collections
import csv
import dataclasses
import functools
import hashlib
import pathlib
import re
import sys
import sysconfig

import grain
import numpy as np

from attention.data.language import read_text

# Ids of what is no word, in `Words` and in bytes alike.
PADDING, UNKNOWN = 0, 1
_HELD_OUT = 5  # one of so many examples is held out, at random


@dataclasses.dataclass(frozen=True)
class Words:
  """The most frequent words and signs of a text; lower case."""

  words: tuple[str, ...]

  @classmethod
  def of(cls, texts, size: int) -> 'Words':
    counts = collections.Counter(w for text in texts for w in cls.split(text))
    # Ties in the order of the alphabet: the same on every machine.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return cls(tuple(word for word, _ in ranked[: size - 2]))

  @staticmethod
  def split(text: str) -> list[str]:
    return re.findall(r'\w+|[^\w\s]', text.lower())

  @property
  def size(self) -> int:
    return len(self.words) + 2

  @functools.cached_property
  def _ids(self):
    return {word: i + 2 for i, word in enumerate(self.words)}

  def encode(self, text: str) -> np.ndarray:
    """Token ids [t] int32; a word it doesn't have is UNKNOWN."""
    ids = [self._ids.get(word, UNKNOWN) for word in self.split(text)]
    return np.array(ids, np.int32)

  def decode(self, tokens) -> list[str]:
    names = ('', '�', *self.words)
    return [names[int(t)] for t in tokens]


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes, behind padding and unknown: any text."""

  size = 258

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 2

  def decode(self, tokens) -> list[str]:
    return [chr(int(t) - 2) if t > 1 else '' for t in tokens]


@dataclasses.dataclass(frozen=True)
class Part:
  """Examples: to train on, or held out."""

  inputs: np.ndarray  # [n, t] int32 tokens or [n, t, c] float32 vectors
  lengths: np.ndarray  # [n] int32
  targets: np.ndarray  # [n] int32

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    return {
      field.name: getattr(self, field.name)[index]
      for field in dataclasses.fields(self)
    }

  def __len__(self) -> int:
    return len(self.targets)


@dataclasses.dataclass(frozen=True)
class Examples:
  """Sequences of some classes, in batches."""

  name: str  # where they came from
  sha256: str
  labels: tuple[str, ...]  # of the classes
  vocabulary: Words | Bytes | None  # None: vectors
  train: Part
  held_out: Part
  batch_size: int
  seed: int
  augment: object = None  # (example, numpy generator) -> example

  @functools.cached_property
  def _batches(self):
    examples = (
      grain.MapDataset.range(len(self.train))
      .seed(self.seed)
      .shuffle()
      .repeat()
      .map(self.train.__getitem__)
    )
    if self.augment is not None:
      examples = examples.random_map(self.augment)
    return examples.batch(self.batch_size)

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Training batch `step`, a function of (seed, step) alone."""
    return self._batches[step]

  def held_out_batches(self, batch_size: int):
    """All held-out examples in order, the last batch padded; 'is_real' [b]."""
    count = len(self.held_out)
    for start in range(0, count, batch_size):
      rows = np.arange(start, start + batch_size)
      yield {**self.held_out[rows % count], 'is_real': rows < count}


def load(kind: str, **data) -> Examples:
  """The examples that `config.data` asks for.

  Args:
    kind: 'digits' or 'text'.
    **data: of `load_digits` or `load_text`.

  Raises:
    ValueError, OSError: as those; an unknown kind.
  """
  if kind not in _KINDS:
    raise ValueError(
      f'data.kind: expected one of {sorted(_KINDS)}, got {kind!r}'
    )
  if data['batch_size'] < 1:
    raise ValueError(
      f'data.batch_size: expected 1 or more, got {data["batch_size"]}'
    )
  return _KINDS[kind](**data)


def load_digits(
  *,
  path: str = '',
  patch_size: int = 4,
  stride: int = 1,
  is_shifted: bool = True,
  batch_size: int,
  seed: int = 0,
) -> Examples:
  """scikit-learn's digits: 8 × 8 pixels in patches, one a position.

  Args:
    path: '', as they come with scikit-learn.
    patch_size: pixels along each side of a patch.
    stride: pixels from one patch to the next; less than patch_size: overlap.
    is_shifted: whether training images are moved by up to a pixel each way.
    batch_size: images in a batch.
    seed: of the fifth held out, the order and the shifts.

  Raises:
    ValueError: a path, patches that don't fit, or scikit-learn isn't there.
  """
  if path:
    raise ValueError(f"data.path: expected '' with kind='digits', got {path!r}")
  for key, value in (('patch_size', patch_size), ('stride', stride)):
    if not 1 <= value <= 8:
      raise ValueError(f'data.{key}: expected 1 to 8, got {value}')
  try:
    from sklearn import datasets
  except ImportError:
    raise ValueError(
      "data.kind: 'digits' needs scikit-learn; pip install -e '.[data]'"
    ) from None
  digits = datasets.load_digits()
  images = np.pad(
    digits.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1))
  )
  targets = digits.target.astype(np.int32)
  order = np.random.default_rng(seed).permutation(len(images))
  count = len(images) // _HELD_OUT

  def cut(images, top, left):
    """Patches [..., t, patch_size²] of a padded image, moved."""
    seen = images[..., top : top + 8, left : left + 8]
    windows = np.lib.stride_tricks.sliding_window_view(
      seen, (patch_size, patch_size), (-2, -1)
    )[..., ::stride, ::stride, :, :]
    *batch, rows, columns, _, _ = windows.shape
    return windows.reshape(*batch, rows * columns, patch_size**2)

  def part(index, inputs):
    lengths = np.full(len(index), cut(images[0], 1, 1).shape[0], np.int32)
    return Part(inputs, lengths, targets[index])

  def augment(example, generator):
    top, left = generator.integers(0, 3, 2) if is_shifted else (1, 1)
    return {**example, 'inputs': cut(example['inputs'], top, left)}

  train, held_out = order[count:], order[:count]
  return Examples(
    name="scikit-learn's digits",
    sha256=hashlib.sha256(images.tobytes() + targets.tobytes()).hexdigest(),
    labels=tuple(map(str, digits.target_names)),
    vocabulary=None,
    train=part(train, images[train]),
    held_out=part(held_out, cut(images[held_out], 1, 1)),
    augment=augment,
    batch_size=batch_size,
    seed=seed,
  )


def load_text(
  *,
  path: str = '',
  level: str = 'words',
  vocab_size: int = 10_000,
  text_column: str = 'text',
  label_column: str = 'label',
  context_size: int,
  batch_size: int,
  seed: int = 0,
) -> Examples:
  """Texts with a class.

  Args:
    path: a folder with a folder of UTF-8 files for each class, or with two such
      folders, `train` and `test`; or a CSV file with a header; or '': passages
      of the Python standard library's packages, whose names are the classes.
    level: 'words' or 'bytes': what a token is.
    vocab_size: the most words to know.
    text_column: of the CSV file.
    label_column: of the CSV file.
    context_size: tokens of a text that are read; what is behind is cut off.
    batch_size: texts in a batch.
    seed: of the fifth held out, where the data has no `test`, and of the order.

  Raises:
    ValueError: an unknown level, a column that isn't there, one class only, a
      class of `test` that `train` has not, files that aren't UTF-8.
    OSError: files that can't be read.
  """
  if level not in ('words', 'bytes'):
    raise ValueError(f"data.level: expected 'words' or 'bytes', got {level!r}")
  for key, value, least in (
    ('context_size', context_size, 1),
    ('vocab_size', vocab_size, 3),
  ):
    if value < least:
      raise ValueError(f'data.{key}: expected {least} or more, got {value}')
  train, held_out = _read(path, text_column, label_column)
  if held_out is None:
    order = np.random.default_rng(seed).permutation(len(train))
    count = max(1, len(train) // _HELD_OUT)
    train, held_out = (
      [train[i] for i in order[count:]],
      [train[i] for i in order[:count]],
    )
  labels = sorted({label for _, label in train})
  name = path or "the Python standard library's packages"
  if len(labels) < 2:
    raise ValueError(f'{name}: expected two classes or more, got {labels}')
  strange = sorted({label for _, label in held_out} - set(labels))
  if strange:
    raise ValueError(f'{name}: class {strange[0]!r} is held out only, in test')
  vocabulary = (
    Bytes()
    if level == 'bytes'
    else Words.of((text for text, _ in train), vocab_size)
  )
  digest = hashlib.sha256()
  for text, label in (*train, *held_out):
    digest.update(f'{len(text)} {label}\n{text}'.encode())

  def part(examples):
    inputs = np.full((len(examples), context_size), PADDING, np.int32)
    lengths = np.zeros(len(examples), np.int32)
    for i, (text, _) in enumerate(examples):
      tokens = vocabulary.encode(text)[:context_size]
      inputs[i, : len(tokens)], lengths[i] = tokens, len(tokens)
    targets = [labels.index(label) for _, label in examples]
    return Part(inputs, lengths, np.array(targets, np.int32))

  return Examples(
    name=name,
    sha256=digest.hexdigest(),
    labels=tuple(labels),
    vocabulary=vocabulary,
    train=part(train),
    held_out=part(held_out),
    batch_size=batch_size,
    seed=seed,
  )


_KINDS = {'digits': load_digits, 'text': load_text}


def _read(path, text_column, label_column):
  """(text, class) to train on, and those held out, None if not told apart."""
  if not path:
    return _standard_library_packages(), None
  root = pathlib.Path(path)
  if not root.is_dir():
    return _read_table(root, text_column, label_column), None
  if (root / 'train').is_dir() and (root / 'test').is_dir():
    return _read_folders(root / 'train'), _read_folders(root / 'test')
  return _read_folders(root), None


def _read_folders(root):
  files = [
    (file, folder.name)
    for folder in sorted(p for p in root.iterdir() if p.is_dir())
    for file in sorted(p for p in folder.rglob('*') if p.is_file())
  ]
  if len({label for _, label in files}) < 2:
    found = sorted({label for _, label in files})
    raise ValueError(
      f'{root}: expected a folder of files for each of two classes or more, '
      f'got {found}'
    )
  return [(read_text(str(file)), label) for file, label in files]


def _read_table(path, text_column, label_column):
  text = read_text(str(path))
  csv.field_size_limit(sys.maxsize)
  rows = list(csv.DictReader(text.splitlines(keepends=True)))
  for key, column in (
    ('text_column', text_column),
    ('label_column', label_column),
  ):
    there = list(rows[0]) if rows else []
    if column not in there:
      raise ValueError(
        f'data.{key}: {path} has no column {column!r}; it has {there}'
      )
  for number, row in enumerate(rows):
    if row[text_column] is None or row[label_column] is None:
      raise ValueError(f'{path}: row {number + 1} has too few columns')
  return [(row[text_column], row[label_column]) for row in rows]


_PACKAGES = (
  'asyncio',
  'ctypes',
  'email',
  'http',
  'idlelib',
  'importlib',
  'multiprocessing',
  'tkinter',
  'unittest',
  'xml',
)
_PASSAGE = 20  # lines


def _standard_library_packages():
  """Passages of the running Python's packages: a text every machine has."""
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  examples = []
  for name in _PACKAGES:
    for path in sorted((folder / name).rglob('*.py')):
      if 'test' in str(path.relative_to(folder / name)):
        continue
      source = path.read_bytes()
      lines = source.decode().splitlines() if source.isascii() else []
      for start in range(0, len(lines), _PASSAGE):
        passage = '\n'.join(lines[start : start + _PASSAGE])
        # A package that names itself would give itself away.
        passage = re.sub(rf'(?i){name}', '…', passage)
        if len(passage) > 200:
          examples.append((passage, name))
  if not examples:
    raise ValueError(
      f'{folder}: this Python comes without its source; pass '
      '--config.data.path=FOLDER'
    )
  return examples
