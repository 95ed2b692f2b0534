"""metrics.jsonl: what a run measured, a JSON object a line."""

import contextlib
import json
import math
import pathlib


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics file; an unfinished last line is passed over."""
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [json.loads(line) for line in lines[:-1] if line]


class Metrics:
  """Writes metrics.jsonl, a line at a time, each on disk before the next."""

  def __init__(self, path: pathlib.Path, step: int, *, is_kept: bool = True):
    """Takes the lines of a file up to `step`, the restored one.

    Args:
      path: of the file; without the later lines once something is written.
      step: what comes after it is forgotten.
      is_kept: whether this process writes; others only remember.
    """
    self.lines = [line for line in read(path) if line['step'] <= step]
    self._path, self._is_kept = path, is_kept
    self._file = None

  def has(self, prefix: str, step: int) -> bool:
    """Whether something of that kind, such as 'eval/', is known of a step."""
    return any(
      line['step'] == step and any(key.startswith(prefix) for key in line)
      for line in self.lines
    )

  def write(self, step: int, values: dict) -> None:
    """Adds a line; numbers that aren't finite are left out.

    Raises:
      OSError: it isn't on disk; the next call that succeeds makes up for it.
    """
    values = {k: float(v) for k, v in values.items()}
    finite = {k: v for k, v in values.items() if math.isfinite(v)}
    self.lines.append({'step': step, **finite})
    if not self._is_kept:
      return
    try:
      if self._file is None:
        self._rewrite()
      else:
        self._file.write(_format(self.lines[-1]))
        self._file.flush()
    except OSError:
      self.close()
      raise

  def close(self) -> None:
    file, self._file = self._file, None
    if file:
      with contextlib.suppress(OSError):  # what it holds is in `lines` too
        file.close()

  def _rewrite(self):
    partial = self._path.with_suffix('.part')
    partial.write_text(''.join(map(_format, self.lines)))
    partial.replace(self._path)
    self._file = self._path.open('a')


def _format(line):
  return json.dumps(line) + '\n'
