"""Classification data: digits as patches, and texts in folders or a table."""

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import pathlib
import re
import sys
import sysconfig

import grain
import numpy as np

from attention.data.files import read_text

# Special ids, shared by `Words` and `Bytes`.
PADDING, UNKNOWN = 0, 1
_HELD_OUT = 5  # one in five examples is held out, at random


@dataclasses.dataclass(frozen=True)
class Words:
  """The most frequent words and punctuation marks of a text, in lower case."""

  words: tuple[str, ...]

  @classmethod
  def of(cls, texts, size: int) -> 'Words':
    counts = collections.Counter(w for text in texts for w in cls.split(text))
    # Ties are broken alphabetically, so that the order is deterministic.
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
    """Encode a text as ids [t] int32; out-of-vocabulary words are UNKNOWN."""
    ids = [self._ids.get(word, UNKNOWN) for word in self.split(text)]
    return np.array(ids, np.int32)

  def decode(self, tokens) -> list[str]:
    names = ('', '�', *self.words)
    return [names[int(t)] for t in tokens]


@dataclasses.dataclass(frozen=True)
class Bytes:
  """UTF-8 bytes, offset by the special ids; any text can be encoded."""

  size = 258

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 2

  def decode(self, tokens) -> list[str]:
    return [chr(int(t) - 2) if t > 1 else '' for t in tokens]


@dataclasses.dataclass(frozen=True)
class Part:
  """The training or held-out part of a data set."""

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
  """Sequences with class labels, in batches."""

  name: str  # source of the data
  sha256: str
  labels: tuple[str, ...]  # class names
  vocabulary: Words | Bytes | None  # None for vectors
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
    """Return training batch `step`, which depends only on (seed, step)."""
    return self._batches[step]

  def held_out_batches(self, batch_size: int):
    """Yield held-out examples in order; 'is_real' [b] is False at padding."""
    count = len(self.held_out)
    for start in range(0, count, batch_size):
      rows = np.arange(start, start + batch_size)
      yield {**self.held_out[rows % count], 'is_real': rows < count}


def load(kind: str, **data) -> Examples:
  """Load the data set described by `config.data`.

  Args:
    kind: 'digits' or 'text'.
    **data: arguments of `load_digits` or `load_text`.

  Raises:
    ValueError: If the kind is unknown or the batch size is below 1; see also
      `load_digits` and `load_text`.
    OSError: If a file cannot be read.
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
  """Load scikit-learn's digits, 8 × 8 pixel images with a patch per position.

  Args:
    path: must be '', since the images come with scikit-learn.
    patch_size: side of a patch in pixels.
    stride: pixels from one patch to the next; patches overlap if it is less
      than `patch_size`.
    is_shifted: whether to shift training images at random by up to one pixel in
      each direction.
    batch_size: images per batch.
    seed: of the held-out split (a fifth of the images), the order and the
      shifts.

  Raises:
    ValueError: If a path is given, `patch_size` or `stride` is out of range, or
      scikit-learn is not installed.
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
      "data.kind: 'digits' requires scikit-learn; pip install -e '.[data]'"
    ) from None
  digits = datasets.load_digits()
  images = np.pad(
    digits.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1))
  )
  targets = digits.target.astype(np.int32)
  order = np.random.default_rng(seed).permutation(len(images))
  count = len(images) // _HELD_OUT

  def extract_patches(images, top, left):
    """Patches [..., t, patch_size²] of a padded image, shifted."""
    shifted = images[..., top : top + 8, left : left + 8]
    windows = np.lib.stride_tricks.sliding_window_view(
      shifted, (patch_size, patch_size), (-2, -1)
    )[..., ::stride, ::stride, :, :]
    *batch, rows, columns, _, _ = windows.shape
    return windows.reshape(*batch, rows * columns, patch_size**2)

  def part(index, inputs):
    lengths = np.full(
      len(index), extract_patches(images[0], 1, 1).shape[0], np.int32
    )
    return Part(inputs, lengths, targets[index])

  def augment(example, generator):
    top, left = generator.integers(0, 3, 2) if is_shifted else (1, 1)
    return {**example, 'inputs': extract_patches(example['inputs'], top, left)}

  train, held_out = order[count:], order[:count]
  return Examples(
    name="scikit-learn's digits",
    sha256=hashlib.sha256(images.tobytes() + targets.tobytes()).hexdigest(),
    labels=tuple(map(str, digits.target_names)),
    vocabulary=None,
    train=part(train, images[train]),
    held_out=part(held_out, extract_patches(images[held_out], 1, 1)),
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
  """Load texts with class labels.

  Args:
    path: a folder with one subfolder of UTF-8 files per class, a folder with
      two such folders `train` and `test`, or a CSV file with a header. With '',
      the texts are passages of packages of the Python standard library, and the
      package names are the classes.
    level: the type of tokens, 'words' or 'bytes'.
    vocab_size: maximum vocabulary size of 'words'.
    text_column: text column of the CSV file.
    label_column: label column of the CSV file.
    context_size: maximum number of tokens per text; longer texts are truncated.
    batch_size: texts per batch.
    seed: of the order, and of the held-out split (a fifth of the texts) if the
      data has no `test`.

  Raises:
    ValueError: If the level is unknown, a column is missing, there is only one
      class, `test` has a class that `train` lacks, or a file is not UTF-8.
    OSError: If a file cannot be read.
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
    raise ValueError(f'{name}: expected two or more classes, got {labels}')
  unknown = sorted({label for _, label in held_out} - set(labels))
  if unknown:
    raise ValueError(
      f'{name}: class {unknown[0]!r} is in test but not in train'
    )
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
  """Read (text, class) pairs: training and held-out, None without a split."""
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
      f'{root}: expected a folder of files for each of two or more classes, '
      f'got {found}'
    )
  return [(read_text(str(file)), label) for file, label in files]


def _read_table(path, text_column, label_column):
  text = read_text(str(path))
  csv.field_size_limit(sys.maxsize)
  rows = list(
    csv.DictReader(io.StringIO(text.removeprefix('\ufeff'), newline=''))
  )
  for key, column in (
    ('text_column', text_column),
    ('label_column', label_column),
  ):
    columns = list(rows[0]) if rows else []
    if column not in columns:
      raise ValueError(
        f'data.{key}: expected one of {columns}, the columns of {path}, got '
        f'{column!r}'
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
_PASSAGE_LINES = 20


def _standard_library_packages():
  """Passages of standard library packages, available on every machine."""
  folder = pathlib.Path(sysconfig.get_path('stdlib'))
  examples = []
  for name in _PACKAGES:
    for path in sorted((folder / name).rglob('*.py')):
      if 'test' in str(path.relative_to(folder / name)):
        continue
      source = path.read_bytes()
      lines = source.decode().splitlines() if source.isascii() else []
      for start in range(0, len(lines), _PASSAGE_LINES):
        passage = '\n'.join(lines[start : start + _PASSAGE_LINES])
        # The package's own name would reveal the class.
        passage = re.sub(rf'(?i){name}', '…', passage)
        if len(passage) > 200:
          examples.append((passage, name))
  if not examples:
    raise ValueError(
      f'{folder}: this Python installation has no source files; pass '
      '--config.data.path=FOLDER'
    )
  return examples
