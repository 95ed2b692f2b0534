"""TensorBoard's view of a run: tb/, by tensorboardX."""

import pathlib

from matplotlib import image


class Board:
  """Scalars, pictures and samples; nothing, without tensorboardX."""

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens the folder and hides what came after `step`, the restored one."""
    try:
      import tensorboardX
    except ImportError:
      self._writer = None
      return
    self._writer = tensorboardX.SummaryWriter(
      str(folder), purge_step=step + 1, max_queue=1
    )

  def scalars(self, step: int, values: dict) -> None:
    if self._writer:
      for name, value in values.items():
        self._writer.add_scalar(name, float(value), step)

  def sample(self, step: int, text: str) -> None:
    if self._writer:
      indented = '\n'.join(f'    {line}' for line in text.split('\n'))
      self._writer.add_text('sample', indented, step)

  def pictures(self, step: int, folder: pathlib.Path) -> None:
    """Takes all PNG files of a folder, by their names."""
    if self._writer:
      for path in sorted(folder.glob('*.png')):
        self._writer.add_image(
          path.stem, image.imread(path), step, dataformats='HWC'
        )

  def flush(self) -> None:
    if self._writer:
      self._writer.flush()

  def close(self) -> None:
    if self._writer:
      self._writer.close()
