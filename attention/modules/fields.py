"""Checks of module fields, with errors of one line."""

import difflib
from collections.abc import Iterable


def check_choice(name: str, value, known: Iterable[str]) -> None:
  """Raises ValueError, with the nearest name, unless `value` is in `known`."""
  known = tuple(known)
  if value not in known:
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else ''
    raise ValueError(f'{name}: expected one of {known}, got {value!r}{hint}')


def check_count(name: str, value: int | None) -> None:
  """Raises ValueError unless `value` is None or at least 1."""
  if value is not None and value < 1:
    raise ValueError(f'{name}: expected 1 or more, got {value}')
