"""A persistent cache of compiled programs, which speeds up later starts."""

import os
import pathlib
import zlib

import jax

# JAX compresses entries with Zstandard if available, and with zlib otherwise.
try:
  from compression import zstd  # Python 3.14
except ImportError:
  try:
    import zstandard as zstd
  except ImportError:
    zstd = None
_ZSTANDARD = b'\x28\xb5\x2f\xfd'


def use_cache() -> None:
  """Enable JAX's compilation cache.

  The cache is in JAX_COMPILATION_CACHE_DIR if set, else in attention/jax in the
  user's cache folder. Entries truncated by a kill are removed: JAX would
  neither use nor replace them, and would warn each time.
  """
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')
    path = pathlib.Path(home) / 'attention' / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  if '://' not in jax.config.jax_compilation_cache_dir:
    remove_truncated(pathlib.Path(jax.config.jax_compilation_cache_dir))


def remove_truncated(folder: pathlib.Path) -> int:
  """Remove truncated entries from a cache; returns their number.

  Only entries written since the last check are read.
  """
  marker, removed = folder / 'checked', 0
  try:
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    # Touch the marker first: entries written during this check are checked
    # next time.
    marker.touch()
    for path in folder.glob('*-cache'):
      if path.stat().st_mtime_ns >= since and not _is_whole(path.read_bytes()):
        path.unlink()
        removed += 1
  except OSError:
    pass  # JAX runs without a cache that cannot be read or changed
  return removed


def _is_whole(entry):
  try:
    if not entry.startswith(_ZSTANDARD):
      zlib.decompress(entry)
    elif zstd:
      zstd.decompress(entry)
  except (zlib.error, getattr(zstd, 'ZstdError', zlib.error)):
    return False
  return True
