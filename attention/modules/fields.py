"""Checks of module fields, with errors of one line."""

import difflib
import numbers
from collections.abc import Iterable


def hint(name, known: Iterable[str]) -> str:
  """The end of an error message that suggests the nearest known name, or ''."""
  near = difflib.get_close_matches(str(name), known, n=1)
  return f'; did you mean {near[0]!r}?' if near else ''


def check_choice(name: str, value, known: Iterable[str]) -> None:
  """Raises ValueError, with the nearest name, unless `value` is in `known`."""
  known = tuple(known)
  if value not in known:
    raise ValueError(
      f'{name}: expected one of {known}, got {value!r}{hint(value, known)}'
    )


def check_count(name: str, value) -> None:
  """Raises ValueError unless `value` is None or a whole number from 1 on."""
  if value is None:
    return
  if not isinstance(value, numbers.Integral) or value < 1:
    raise ValueError(f'{name}: expected 1 or more, got {value!r}')
