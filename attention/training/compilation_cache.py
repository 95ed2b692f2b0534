"""Where compiled programs are kept, so that a second start is quick."""

import os
import pathlib
import zlib

import jax

# Zstandard, where JAX finds it; zlib otherwise.
try:
  from compression import zstd  # Python 3.14
except ImportError:
  try:
    import zstandard as zstd
  except ImportError:
    zstd = None
_ZSTANDARD = b'\x28\xb5\x2f\xfd'


def use_cache() -> None:
  """JAX's compilation cache, in JAX_COMPILATION_CACHE_DIR or our own folder.

  An entry that a kill cut short is removed: JAX would neither use nor replace
  it, and warn each time.
  """
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')
    path = pathlib.Path(home) / 'attention' / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(path))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  if '://' not in jax.config.jax_compilation_cache_dir:
    remove_cut_short(pathlib.Path(jax.config.jax_compilation_cache_dir))


def remove_cut_short(folder: pathlib.Path) -> int:
  """Removes the entries of a cache that aren't whole; returns how many.

  Looks at those only that were written since it last did.
  """
  marker, removed = folder / 'checked', 0
  try:
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    folder.mkdir(parents=True, exist_ok=True)
    # Before looking: what is being written meanwhile is looked at next time.
    marker.touch()
    for path in folder.glob('*-cache'):
      if path.stat().st_mtime_ns >= since and not _is_whole(path.read_bytes()):
        path.unlink()
        removed += 1
  except OSError:
    pass  # a cache that can't be read or changed: JAX does without
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
