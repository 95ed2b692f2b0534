"""Console output of a run: a progress bar on a terminal, or plain lines."""

import contextlib
import time

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from attention.training.reporting import memory


class Stopwatch:
  """Measures the time spent on training steps alone."""

  def __init__(self):
    self._since = time.perf_counter()

  def lap(self) -> float:
    """Return the seconds since the last lap, excluding `paused` blocks."""
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    return seconds

  @contextlib.contextmanager
  def paused(self):
    """Exclude the enclosed block from the measured time."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began


class Reporter:
  """Prints a run's progress."""

  def __init__(self, steps: int, *, is_quiet: bool = False):
    """Create a reporter of a run of `steps` steps; prints nothing if quiet."""
    self._console = Console(highlight=False, soft_wrap=True, quiet=is_quiet)
    self._steps = steps
    self._bar = None
    if self._console.is_terminal and not is_quiet:
      self._bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task('training', total=steps)

  def __enter__(self):
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()

  def print(self, text: str) -> None:
    self._console.print(text, markup=False)

  def advance(self, step: int) -> None:
    if self._bar:
      self._bar.update(self._task, completed=step)

  def log(self, step: int, values: dict) -> None:
    """Print one line of training metrics, or show it beside the bar."""
    parts = [f'loss {values["train/loss"]:.4f}']
    parts += [f'lr {values["train/learning_rate"]:.1e}']
    parts += [f'grad norm {values["train/grad_norm"]:.2f}']
    if 'train/tokens_per_second' in values:
      parts += [f'{values["train/tokens_per_second"]:,.0f} tokens/s']
      left = (self._steps - step) * values['train/seconds_per_step']
      parts += [f'{_duration(left)} left']
    if 'train/utilisation' in values:
      parts += [f'{values["train/utilisation"]:.0%} of peak']
    if 'train/memory_mib' in values:
      parts += [memory.format_bytes(round(values['train/memory_mib'] * 2**20))]
    line = '  '.join(parts)
    if self._bar:
      self._bar.update(self._task, completed=step, description=line)
    else:
      self.print(f'step {step:,}/{self._steps:,}  {line}')

  def evaluated(self, step: int, values: dict) -> None:
    figures = '  '.join(f'{k} {v:.4f}' for k, v in values.items())
    self.print(f'step {step:,}/{self._steps:,}  {figures}')


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'
