"""metrics.jsonl: what a run measured, a JSON object a line."""

import json
import pathlib


def read(path: pathlib.Path) -> list[dict]:
  """The lines of a metrics file; an unfinished last line is passed over."""
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [json.loads(line) for line in lines[:-1] if line]


class Metrics:
  """Writes metrics.jsonl, a line at a time, each on disk before the next."""

  def __init__(self, path: pathlib.Path, step: int):
    """Opens the file and removes what came after `step`, the restored one."""
    self.lines = [line for line in read(path) if line['step'] <= step]
    partial = path.with_suffix('.part')
    partial.write_text(''.join(json.dumps(x) + '\n' for x in self.lines))
    partial.replace(path)
    self._file = path.open('a')

  def write(self, step: int, values: dict) -> None:
    line = {'step': step, **{k: float(v) for k, v in values.items()}}
    self.lines.append(line)
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()

  def close(self) -> None:
    self._file.close()
