"""Weights of a folder in safetensors files: one, several, or by an index."""

import contextlib
import dataclasses
import json
import os
import pathlib

import numpy as np

try:
  from safetensors import SafetensorError, safe_open
  from safetensors import numpy as safetensors
except ImportError:
  raise ImportError(
    "weights require safetensors: pip install -e '.[interop]'"
  ) from None

_WHOLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where an array is: a tensor of that key, or a part of one."""

  key: str
  is_transposed: bool = False  # a matrix [out, in] in the file
  column: int | None = None  # of each two adjacent ones in the last axis

  def shape(self, stored: tuple) -> tuple:
    """The array's shape, from the tensor's."""
    if self.column is not None:
      return (*stored[:-1], stored[-1] // 2)
    return stored[::-1] if self.is_transposed else stored

  def tensor_shape(self, shape: tuple) -> tuple:
    """The tensor's shape, from the array's."""
    if self.column is not None:
      return (*shape[:-1], 2 * shape[-1])
    return shape[::-1] if self.is_transposed else shape


class Weights:
  """The tensors of a folder, read on demand.

  Raises:
    FileNotFoundError: the folder has no safetensors files, or lacks one of its
      index.
    ValueError: a file is damaged, or a tensor is in two files.
  """

  def __init__(self, folder: pathlib.Path):
    self._files = contextlib.ExitStack()
    self._handles, origins = {}, {}
    for path in _files(folder):
      try:
        # Pages of a memory map would count as memory of this process.
        opened = safe_open(path, 'np', backend='pread')
        handle = self._files.enter_context(opened)
      except SafetensorError as error:
        raise ValueError(f'{path}: not safetensors: {error}') from None
      for key in handle.keys():  # noqa: SIM118
        if key in origins:
          raise ValueError(
            f'{key}: expected once, got {origins[key]} and {path}'
          )
        origins[key], self._handles[key] = path, handle
    self._names = {key: key for key in self._handles}  # in the files

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._files.close()

  def rename(self, function) -> None:
    """Replace each key by function(key), or forget it where that is None."""
    names, handles = self._names, self._handles
    self._names, self._handles = {}, {}
    for key, handle in handles.items():
      if (new := function(key)) is None:
        continue
      if new in self._names:
        raise ValueError(f'{new}: expected once, got {self._names[new]} too')
      self._names[new], self._handles[new] = names[key], handle

  def shapes(self) -> dict[str, tuple]:
    """The shape of each tensor, in the file's orientation."""
    return {key: tuple(self._slice(key).get_shape()) for key in self._handles}

  def check_floats(self) -> None:
    """Raise ValueError for a tensor that is not floating-point."""
    for key in self._handles:
      if (dtype := self._slice(key).get_dtype()) not in _FLOATS:
        raise ValueError(f'{key}: expected floats, got {dtype}')

  def read(self, stored: Stored, index=None) -> np.ndarray:
    """Read an array, or the part of it at `index`, a tuple of slices."""
    tensor = self._slice(stored.key)
    shape = tuple(tensor.get_shape())
    sizes = stored.shape(shape)
    index = [slice(None)] * len(sizes) if index is None else index
    spans = [slice(*i.indices(n)) for i, n in zip(index, sizes, strict=True)]
    if stored.is_transposed:
      spans = spans[::-1]
    if stored.column is not None:
      last = spans[-1]
      spans[-1] = slice(2 * last.start, 2 * last.stop)
    if all(s == slice(0, n, s.step) for s, n in zip(spans, shape, strict=True)):
      # Several times as fast as a slice of everything.
      found = self._handles[stored.key].get_tensor(self._names[stored.key])
    else:
      found = tensor[tuple(spans)]
    if stored.column is not None:
      return found[..., stored.column :: 2]
    return found.T if stored.is_transposed else found

  def _slice(self, key):
    return self._handles[key].get_slice(self._names[key])


def write(folder: pathlib.Path, shapes: dict, read, max_bytes: int) -> None:
  """Write tensors to a folder, in place of the weights that it has.

  Args:
    folder: an existing folder.
    shapes: {key: an object with shape and dtype}.
    read: a function of a key that returns the array; the arrays of one file are
      in memory at a time.
    max_bytes: size of a file; a folder of several has an index.
  """
  sizes = {
    key: int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize
    for key, x in shapes.items()
  }
  parts, room = [[]], max_bytes
  for key, size in sizes.items():
    if parts[-1] and size > room:
      parts.append([])
      room = max_bytes
    parts[-1].append(key)
    room -= size
  names = [
    f'model-{i + 1:05d}-of-{len(parts):05d}.safetensors'
    for i in range(len(parts))
  ]
  if len(parts) == 1:
    names = [_WHOLE]
  for name, keys in zip(names, parts, strict=True):
    arrays = {key: np.ascontiguousarray(read(key)) for key in keys}
    part = folder / f'{name}.part'
    part.touch()
    mode = part.stat().st_mode
    safetensors.save_file(arrays, part, metadata={'format': 'pt'})
    part.chmod(mode)  # `save_file` leaves it readable by its owner only
  if len(parts) > 1:
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': {
        key: name
        for name, keys in zip(names, parts, strict=True)
        for key in keys
      },
    }
    (folder / f'{_INDEX}.part').write_text(json.dumps(index, indent=2))
    names = [*names, _INDEX]
  for old in [*folder.glob('model*.safetensors'), folder / _INDEX]:
    if old.name not in names:
      old.unlink(missing_ok=True)
  for name in names:
    os.replace(folder / f'{name}.part', folder / name)


def _files(folder):
  index = folder / _INDEX
  if (folder / _WHOLE).exists():
    return [folder / _WHOLE]
  if index.exists():
    try:
      names = sorted({*json.loads(index.read_text())['weight_map'].values()})
    except (ValueError, KeyError, AttributeError, TypeError):
      raise ValueError(
        f"{index}: expected JSON with an object 'weight_map'"
      ) from None
    for name in names:
      if not (folder / name).exists():
        raise FileNotFoundError(
          f'{folder / name}: no such file; {index.name} names it'
        )
    return [folder / name for name in names]
  found = sorted(folder.glob('*.safetensors'))
  if not found:
    raise FileNotFoundError(
      f'{folder}: expected *.safetensors files, got none; convert weights in '
      'another format with save_pretrained of transformers'
    )
  return found
