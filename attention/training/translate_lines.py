"""Lines in, answers out: what `python -m attention translate` does."""

import queue
import threading

_ROWS = 64  # lines that are answered at once, if as many are there


def answer_lines(task, params, lines, output, errors, *, beam_size: int) -> int:
  """Writes an answer for each line as soon as it can.

  Lines that are there already are answered together; a slow writer gets each
  answer before the next line.

  Args:
    task: a `Translation`.
    params: of its model.
    lines: binary file to read.
    output: text file for the answers, one a line; a line that can't be read
      has an empty one.
    errors: text file for why it can't, and for a prompt if `lines` is a
      terminal.
    beam_size: see `Translation.translate`.

  Returns:
    How many lines couldn't be read.
  """
  is_terminal = lines.isatty()
  waiting = queue.Queue(4 * _ROWS)

  def read():
    for line in lines:
      waiting.put(line)
    waiting.put(None)

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
  """The lines that are there, at least one, and whether they are the last."""
  batch = []
  while len(batch) < _ROWS:
    try:
      line = waiting.get(block=not batch)
    except queue.Empty:
      return batch, False
    if line is None:
      return batch, True
    batch.append(line)
  return batch, False


def _read(task, line):
  """The text of a line, and why it is refused, if it is."""
  try:
    text = line.decode().strip()
  except UnicodeDecodeError as error:
    byte = line[error.start]
    return '', f'not UTF-8 at byte {error.start} (0x{byte:02x})'
  refusal = task.refusals([text]).get(0)
  return ('' if refusal else text), refusal
