"""Translate lines from standard input with a run's model."""

import queue
import sys
import threading

from attention.commands import trained_models

_ROWS = 64  # maximum number of lines translated together


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  parser.add_argument('--workdir', required=True, help='folder of the run')
  trained_models.add_beam_size(parser)


def run(arguments) -> int:
  """Run the command; returns the exit status."""
  task, params = trained_models.open_task(arguments, 'translation')
  num_refused = answer_lines(
    task,
    params,
    sys.stdin.buffer,
    sys.stdout,
    sys.stderr,
    beam_size=arguments.beam_size,
  )
  return 1 if num_refused else 0


def answer_lines(task, params, lines, output, errors, *, beam_size: int) -> int:
  """Translate each line as soon as possible.

  Lines that are already available are translated together. A line that arrives
  alone is answered before the next one arrives.

  Args:
    task: a `Translation`.
    params: parameters of its model.
    lines: binary file to read.
    output: text file for the answers, one per line; a refused line has an empty
      answer.
    errors: text file for the reasons of refusals, and for a prompt if `lines`
      is a terminal.
    beam_size: see `Translation.translate`.

  Returns:
    The number of refused lines.

  Raises:
    OSError: a line cannot be read.
  """
  is_terminal = lines.isatty()
  waiting = queue.Queue(4 * _ROWS)

  def read():
    try:
      for line in lines:
        waiting.put(line)
      waiting.put(None)
    except OSError as error:
      waiting.put(error)

  threading.Thread(target=read, daemon=True).start()
  number, num_refused, is_over = 0, 0, False
  while not is_over:
    if is_terminal:
      print('> ', end='', file=errors, flush=True)
    batch, is_over = _take(waiting)
    texts = []
    for line in batch:
      number += 1
      text, refusal = _read(task, line)
      texts.append(text)
      if refusal:
        num_refused += 1
        print(f'line {number}: {refusal}', file=errors, flush=True)
    for answer in task.translate(params, texts, beam_size=beam_size):
      print(' '.join(answer.split('\n')), file=output)
    output.flush()
  return num_refused


def _take(waiting):
  """Return the available lines, waiting for one, and whether input ended."""
  batch = []
  while len(batch) < _ROWS:
    try:
      line = waiting.get(block=not batch)
    except queue.Empty:
      return batch, False
    if line is None:
      return batch, True
    if isinstance(line, OSError):
      raise line
    batch.append(line)
  return batch, False


def _read(task, line):
  """Return the text of a line, and the reason if it is refused."""
  try:
    text = line.decode().strip()
  except UnicodeDecodeError as error:
    byte = line[error.start]
    return '', f'not UTF-8 at byte {error.start} (0x{byte:02x})'
  refusal = task.refusals([text]).get(0)
  return ('' if refusal else text), refusal
