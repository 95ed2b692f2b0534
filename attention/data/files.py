"""Reading text files, with errors that say where they are damaged."""

import gzip
import pathlib


def read_text(path: str) -> str:
  """Read a UTF-8 text file.

  Raises:
    ValueError: If the file is empty or not UTF-8 (the message has the byte
      offset).
    OSError: If the file cannot be read.
  """
  content = pathlib.Path(path).read_bytes()
  if not content:
    raise ValueError(f'{path}: the file is empty')
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}: not UTF-8 at byte {error.start} '
      f'(0x{content[error.start]:02x}); convert the file to UTF-8'
    ) from None


def read_lines(path: str) -> list[str]:
  """Read the lines of a UTF-8 file, plain or gzip.

  Raises:
    ValueError: If the file is not UTF-8 (the message has the line number) or is
      a damaged gzip file.
    OSError: If the file cannot be read.
  """
  content = pathlib.Path(path).read_bytes()
  if content.startswith(b'\x1f\x8b'):
    try:
      content = gzip.decompress(content)
    except (OSError, EOFError) as error:
      raise ValueError(f'{path}: damaged gzip file: {error}') from None
  lines = content.split(b'\n')
  if not lines[-1]:
    lines.pop()
  texts = []
  for number, line in enumerate(lines, 1):
    try:
      texts.append(line.decode().rstrip('\r'))
    except UnicodeDecodeError as error:
      raise ValueError(
        f'{path}: line {number}: not UTF-8 at byte {error.start} '
        f'(0x{line[error.start]:02x}); convert the file to UTF-8'
      ) from None
  return texts
