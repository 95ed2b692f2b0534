"""Dates written in many languages, and the same in ISO 8601."""

import datetime

import numpy as np

# Languages of the European Union, and more, in which these formats can be told
# apart: a numeric one has the day before the month everywhere.
LANGUAGES = ('da', 'de', 'en', 'es', 'fi', 'fr', 'it', 'nl', 'pl', 'pt', 'sv')
UNSEEN = ('ca', 'cs', 'nb', 'ro')
FORMATS = ('medium', 'long', 'full')
_FIRST, _LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
_NUM_HELD_OUT = 4_000  # days that no training pair has


def pairs(part: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
  """Dates as Babel writes them, and as ISO 8601 does.

  Args:
    part: 'train'; 'validation', of other days in the same languages; 'unseen',
      of those days in languages that the others don't have.
    count: how many pairs.
    seed: of the choice of days, languages and formats.

  Returns:
    For example [('mercredi 5 mars 1997', '1997-03-05'), …].

  Raises:
    ValueError: an unknown part; Babel isn't installed.
  """
  if part not in ('train', 'validation', 'unseen'):
    raise ValueError(f'part: expected train, validation or unseen, got {part}')
  try:
    from babel.dates import format_date
  except ImportError:
    raise ValueError("dates need Babel: pip install -e '.[data]'") from None
  rng = np.random.default_rng(seed)
  days = rng.permutation((_LAST - _FIRST).days + 1)
  is_train = part == 'train'
  days = days[_NUM_HELD_OUT:] if is_train else days[:_NUM_HELD_OUT]
  languages = UNSEEN if part == 'unseen' else LANGUAGES
  rng = np.random.default_rng([seed, is_train, len(languages)])
  found = []
  for day, language, style in zip(
    rng.choice(days, count),
    rng.choice(languages, count),
    rng.choice(FORMATS, count),
    strict=True,
  ):
    date = _FIRST + datetime.timedelta(days=int(day))
    text = format_date(date, format=str(style), locale=str(language))
    found.append((text, date.isoformat()))
  return found
