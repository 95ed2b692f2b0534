"""What a run says while it runs: a bar on a terminal, plain lines elsewhere."""

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
  """Seconds spent on steps alone."""

  def __init__(self):
    self._since = time.perf_counter()

  def lap(self) -> float:
    """Seconds since the last lap, without what `exclude` took out."""
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    return seconds

  @contextlib.contextmanager
  def paused(self):
    """What is done meanwhile does not count."""
    began = time.perf_counter()
    yield
    self._since += time.perf_counter() - began


class Reporter:
  """Prints a run's progress."""

  def __init__(self, steps: int, *, is_heard: bool = True):
    """Speaks, if it is the process that is heard."""
    self._console = Console(highlight=False, soft_wrap=True, quiet=not is_heard)
    self._steps = steps
    self._bar = None
    if self._console.is_terminal and is_heard:
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

  def say(self, text: str) -> None:
    self._console.print(text, markup=False)

  def advance(self, step: int) -> None:
    if self._bar:
      self._bar.update(self._task, completed=step)

  def log(self, step: int, values: dict) -> None:
    """One line of training figures."""
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
      self.say(f'step {step:,}/{self._steps:,}  {line}')

  def evaluated(self, step: int, values: dict) -> None:
    figures = '  '.join(f'{k} {v:.4f}' for k, v in values.items())
    self.say(f'step {step:,}/{self._steps:,}  {figures}')


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'
