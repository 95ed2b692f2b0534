"""TensorBoard's view of a run: tb/, by tensorboardX."""

import contextlib
import pathlib
import platform
import time

from matplotlib import image


class TensorBoard:
  """Scalars, pictures and samples; nothing, without tensorboardX.

  tensorboardX's own SummaryWriter hands over to a thread, which a full disk
  ends, after which the run would wait for it for ever: here files are written
  at once. After an OSError nothing more is.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens the folder and hides what came after `step`, the restored one."""
    self._writer = None
    try:
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError:
      return
    self._summary, self._events = summary, event_pb2
    self._values = summary_pb2.Summary
    folder.mkdir(parents=True, exist_ok=True)
    # As TensorBoard finds them: seconds since 1970, and a host.
    name = f'events.out.tfevents.{time.time():.0f}.{platform.node()}'
    self._writer = record_writer.RecordWriter(str(folder / name))
    self._write(0, file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step + 1, session_log=start)

  def scalars(self, step: int, values: dict) -> None:
    if self._writer:
      # Not by summary.scalar, which logs a warning of each NaN.
      scalars = [
        self._values.Value(tag=name, simple_value=float(value))
        for name, value in values.items()
      ]
      self._write(step, summary=self._values(value=scalars))
      self._flush()

  def sample(self, step: int, text: str) -> None:
    if self._writer:
      indented = '\n'.join(f'    {line}' for line in text.split('\n'))
      self._write(step, summary=self._summary.text('sample', indented))
      self._flush()

  def pictures(self, step: int, folder: pathlib.Path) -> None:
    """Takes all PNG files of a folder, by their names."""
    if self._writer:
      for path in sorted(folder.glob('*.png')):
        picture = self._summary.image(
          path.stem, image.imread(path), dataformats='HWC'
        )
        self._write(step, summary=picture)
      self._flush()

  def close(self) -> None:
    if self._writer:
      self._writer.close()

  def _write(self, step, **content):
    event = self._events.Event(step=step, wall_time=time.time(), **content)
    self._try(lambda: self._writer.write(event.SerializeToString()))

  def _flush(self):
    self._try(self._writer.flush)

  def _try(self, write):
    try:
      write()
    except OSError:
      # Its file may end inside a record.
      writer, self._writer = self._writer, None
      with contextlib.suppress(OSError):
        writer.close()
      raise
