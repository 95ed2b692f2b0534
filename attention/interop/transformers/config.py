"""Reading a config.json, with errors that name the file and the key."""

import json
import pathlib
import re

# Keys whose names look like architecture but change no output.
_INERT = {
  '_attn_implementation',
  '_attn_implementation_autoset',
  'attention_dropout',
  'attn_implementation',
  'attn_pdrop',
  'embd_pdrop',
  'experts_per_token',
  'output_attentions',
  'output_router_logits',
  'reorder_and_upcast_attn',
  'router_aux_loss_coef',
  'summary_activation',
}
# What an architecture is called; keys without such words are about training,
# generation or files.
_ARCHITECTURE = re.compile(
  'act_fn|activation|attn|attention|bias|cap|embed|expert|head|layer_types|'
  'moe|multiplier|norm|quant|residual|rope|rotary|scal|window'
)


class Config:
  """The keys of a config.json; it notes which ones are read."""

  def __init__(self, values: dict, where: str):
    self._values, self._where = values, where
    self._read = set()

  @classmethod
  def load(cls, path: pathlib.Path) -> 'Config':
    """Read a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not a JSON object.
    """
    try:
      values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
      raise FileNotFoundError(
        f'{path.parent}: expected a folder with config.json and '
        '*.safetensors, found no config.json'
      ) from None
    except ValueError as error:
      raise ValueError(f'{path}: not JSON: {error}') from None
    if not isinstance(values, dict):
      raise ValueError(f'{path}: expected an object, got {values!r:.40}')
    return cls(values, str(path))

  def get(self, key: str, default=None):
    """The value of a key; null is as good as a missing key."""
    self._read.add(key)
    value = self._values.get(key)
    return default if value is None else value

  def has(self, key: str) -> bool:
    """Whether the key is there, be it with null."""
    return key in self._values

  def count(self, key: str, default: int | None = None) -> int | None:
    """A positive int, or None if the key is missing."""
    value = self.get(key, default)
    if value is not None and (type(value) is not int or value < 1):
      raise self.error(key, 'a positive integer', value)
    return value

  def flag(self, key: str, default: bool) -> bool:
    value = self.get(key, default)
    if type(value) is not bool:
      raise self.error(key, 'true or false', value)
    return value

  def number(
    self, key: str, default: int | float | None = None
  ) -> float | None:
    value = self.get(key, default)
    if value is not None and type(value) not in (int, float):
      raise self.error(key, 'a number', value)
    return None if value is None else float(value)

  def part(self, key: str) -> 'Config | None':
    """An object in the object, or None if the key is missing."""
    value = self.get(key)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise self.error(key, 'an object', value)
    return Config(value, f'{self._where}: {key}')

  def choice(self, key: str, known, default=None):
    """One of the known values."""
    value = self.get(key, default)
    if value not in known:
      expected = ' or '.join(map(repr, known))
      raise self.error(key, expected, value)
    return value

  def require(self, keys: tuple) -> None:
    """Raise ValueError if a key is missing."""
    missing = sorted(k for k in keys if self._values.get(k) is None)
    if missing:
      raise ValueError(f'{self._where}: missing {", ".join(missing)}')

  def check_all_read(self, is_strict: bool = False) -> None:
    """Raise ValueError for a key about architecture that was not read."""
    for key, value in self._values.items():
      if (
        key not in self._read | _INERT
        and value not in (None, False)
        and (is_strict or _ARCHITECTURE.search(key))
      ):
        raise ValueError(f'{self._where}: {key}: not supported, got {value!r}')

  def error(self, key: str, expected: str, value) -> ValueError:
    return ValueError(
      f'{self._where}: {key}: expected {expected}, got {value!r}'
    )
