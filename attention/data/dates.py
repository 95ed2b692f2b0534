"""Pairs of dates in natural language and in ISO 8601."""

import datetime

import numpy as np

# European languages in which these formats are unambiguous: numeric dates have
# the day before the month in all of them.
LANGUAGES = ('da', 'de', 'en', 'es', 'fi', 'fr', 'it', 'nl', 'pl', 'pt', 'sv')
UNSEEN = ('ca', 'cs', 'nb', 'ro')
FORMATS = ('medium', 'long', 'full')
_FIRST, _LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)
_NUM_HELD_OUT = 4_000  # days excluded from training


def pairs(part: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
  """Generate pairs of a date formatted by Babel and in ISO 8601.

  Args:
    part: 'train'; 'validation', with other days in the same languages; or
      'unseen', with the validation days in languages that the other parts lack.
    count: number of pairs.
    seed: of the choice of days, languages and formats.

  Returns:
    A list such as [('mercredi 5 mars 1997', '1997-03-05'), …].

  Raises:
    ValueError: If the part is unknown or Babel is not installed.
  """
  if part not in ('train', 'validation', 'unseen'):
    raise ValueError(f'part: expected train, validation or unseen, got {part}')
  try:
    from babel.dates import format_date
  except ImportError:
    raise ValueError("dates require Babel: pip install -e '.[data]'") from None
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
