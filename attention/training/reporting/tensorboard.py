"""TensorBoard event files, written to tb/ with tensorboardX."""

import contextlib
import pathlib
import platform
import time


class TensorBoard:
  """Writes scalars, images and samples; does nothing without tensorboardX.

  Events are written synchronously, not with tensorboardX's SummaryWriter: a
  full disk ends its writer thread, and the run would then wait for that thread
  for ever. After an OSError nothing more is written.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Open the folder and hide events after `step`, the restored step."""
    self._writer = None
    try:
      from tensorboardX import record_writer, summary
      from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError:
      return
    self._summary, self._events = summary, event_pb2
    self._values = summary_pb2.Summary
    folder.mkdir(parents=True, exist_ok=True)
    # The name TensorBoard expects: seconds since 1970, then the host.
    name = f'events.out.tfevents.{time.time():.0f}.{platform.node()}'
    self._writer = record_writer.RecordWriter(str(folder / name))
    self._write(0, file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step + 1, session_log=start)

  def scalars(self, step: int, values: dict) -> None:
    if self._writer:
      # summary.scalar would log a warning for every NaN.
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
    """Write all PNG files in a folder, tagged with their names."""
    if self._writer:
      from matplotlib import image

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
      # The file may now end with a partial record.
      writer, self._writer = self._writer, None
      with contextlib.suppress(OSError):
        writer.close()
      raise
