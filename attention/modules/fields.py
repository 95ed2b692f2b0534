"""Checks of module fields, with errors of one line."""

import difflib
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


def check_count(name: str, value: int | None) -> None:
  """Raises ValueError unless `value` is None or at least 1."""
  if value is not None and value < 1:
    raise ValueError(f'{name}: expected 1 or more, got {value}')
