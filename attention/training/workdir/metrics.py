"""metrics.jsonl: the metrics of a run, one JSON object per line."""

import contextlib
import json
import math
import pathlib

from attention.training.workdir import Unusable


def read(path: pathlib.Path) -> list[dict]:
  """Read the lines of a metrics file, ignoring an unfinished last line.

  Raises:
    Unusable: another line is damaged.
  """
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [
    _parse(f'{path}:{n}', line) for n, line in enumerate(lines[:-1], 1) if line
  ]


def _parse(where, text):
  try:
    line = json.loads(text)
    line['step'] + 0
  except (ValueError, KeyError, TypeError):
    raise Unusable(
      f'{where}: expected an object of JSON with a step, got {text[:40]!r}; '
      'remove the line'
    ) from None
  return line


class Metrics:
  """Writes metrics.jsonl line by line, flushing each line."""

  def __init__(self, path: pathlib.Path, step: int, *, is_kept: bool = True):
    """Load the lines of a file up to the restored step.

    Args:
      path: the file. Lines after `step` are removed at the first write.
      step: the restored step; later lines are ignored.
      is_kept: whether this process writes the file; if False, it only keeps the
        lines in memory.
    """
    self.lines = [line for line in read(path) if line['step'] <= step]
    self._path, self._is_kept = path, is_kept
    self._file = None

  def has(self, prefix: str, step: int) -> bool:
    """Whether a step has a metric with this prefix, such as 'eval/'."""
    return any(
      line['step'] == step and any(key.startswith(prefix) for key in line)
      for line in self.lines
    )

  def write(self, step: int, values: dict) -> None:
    """Append a line; non-finite values are omitted.

    Raises:
      OSError: the line could not be written. The next successful call writes it
        as well.
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
      with contextlib.suppress(OSError):  # `lines` has the data as well
        file.close()

  def _rewrite(self):
    partial = self._path.with_suffix('.part')
    partial.write_text(''.join(map(_format, self.lines)))
    partial.replace(self._path)
    self._file = self._path.open('a')


def _format(line):
  return json.dumps(line) + '\n'
