"""Language modelling that starts from a trained model."""

import dataclasses
import functools
import json
import pathlib

import haiku as hk
import jax
import numpy as np

from attention.data import language
from attention.data.subwords import Subwords
from attention.data.vocabularies import Bytes, Characters
from attention.interop.shapes import differences
from attention.modules import lora
from attention.training import transformers_folder
from attention.training.tasks.language import Language
from attention.training.workdir import checkpoints, run_files

_LEVELS = {Bytes: 'bytes', Characters: 'characters', Subwords: 'subwords'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """A trained model."""

  fields: dict  # of `GPT`
  vocabulary: Bytes | Characters | Subwords | None  # None: unknown
  params: dict | None  # in float32; None in a run that is resumed or used
  origin: str  # where it was read, and at which step

  @classmethod
  def read(cls, path: str) -> 'Start':
    """Read the newest checkpoint of a run, or a folder of transformers.

    Raises:
      ValueError: neither is there, or the run is of another task.
      OSError: a file cannot be read.
    """
    folder = pathlib.Path(path)
    if not path or not (folder / 'config.json').exists():
      raise ValueError(
        'init.path: expected the workdir of a run, or a folder with '
        f'config.json and *.safetensors, got {path!r}; set --config.init.path='
      )
    try:
      config = json.loads((folder / 'config.json').read_text())
    except ValueError as error:
      raise ValueError(f'{folder}/config.json: not JSON: {error}') from None
    if 'task' in config and 'model_type' not in config:
      return cls._of_run(folder)
    fields, params, vocabulary = transformers_folder.load(folder)
    return cls(
      fields=json.loads(json.dumps(fields)),
      vocabulary=vocabulary,
      params=params,
      origin=path,
    )

  @classmethod
  def _of_run(cls, workdir):
    config = run_files.load_config(workdir)
    if config.task != 'language':
      raise ValueError(
        f"init.path: expected a run of task 'language', got one of "
        f'{config.task!r} in {workdir}'
      )
    kind = Finetune if 'init' in config else Language
    task = kind.load(config, run_files.load_data(workdir))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    step, params = checkpoints.newest_params(workdir, shapes)
    fields, params = transformers_folder.merged(task.model_fields, params)
    return cls(
      fields=json.loads(json.dumps(fields)),
      vocabulary=task.vocabulary,
      params=jax.tree.map(np.asarray, params),
      origin=f'{workdir} at step {step:,}',
    )

  @classmethod
  def of_record(cls, record: dict) -> 'Start':
    """Restore the model of a run from its data record, without parameters."""
    return cls(
      fields=record['model'],
      vocabulary=language.recorded(record['level'], record['vocabulary']),
      params=None,
      origin=record['init'],
    )

  def with_level(self, level: str) -> 'Start':
    """Return the model with the vocabulary that `config.data.level` names.

    Raises:
      ValueError: the model has another vocabulary, or none is known.
      OSError: the tokenizer cannot be read.
    """
    own = self.vocabulary
    if not level and own is not None:
      return self
    if level != 'bytes' and not level.endswith('.json'):
      raise ValueError(
        "data.level: expected 'bytes' or the path of a tokenizer.json, as "
        f'{self.origin} has none, got {level!r}'
        if own is None
        else f"data.level: expected '', the vocabulary of {self.origin}, got "
        f'{level!r}'
      )
    given = language.given(level)
    if own not in (None, given):
      raise ValueError(
        f"data.level: expected '', as {self.origin} has a vocabulary of "
        f'{own.size:,} {_level(own)}, got {level!r}, which is another'
      )
    return dataclasses.replace(self, vocabulary=given)


class Finetune(Language):
  """A language-modelling task that starts from a trained GPT.

  The model's fields and vocabulary come from `config.init.path`; the fields in
  `config.model` replace the model's own. With low-rank updates (`lora`) nothing
  else is trained.
  """

  def __init__(
    self, start: Start, path: str, model: dict, data, parts: int = 1
  ):
    """Create a task; `create` and `load` do so from a config.

    Args:
      start: the model to start from.
      path: where `Start.read` finds it.
      model: fields of a GPT that replace those of `start`.
      data: as for `Language`, as are `parts`.
      parts: number of micro-batches per training batch.
    """
    fields = {**start.fields, **model}
    if fields.get('attention'):
      fields['attention'] = {**fields['attention']}
      # Set in `model` for the whole model.
      fields['attention'].pop('implementation', None)
    super().__init__(start.vocabulary, fields, data, parts)
    self._start, self._path = start, path
    has_updates = (fields.get('lora') or {}).get('rank')
    self.is_trained = lora.is_adapter if has_updates else None

  @classmethod
  def create(cls, config, record: dict | None = None) -> 'Finetune':
    """Create the task of a config, with its data.

    Args:
      config: the run's config.
      record: the data record of a run to resume or use; the model is then read
        again only if the run has to start anew, see `pretrained`.
    """
    start = Start.of_record(record) if record else Start.read(config.init.path)
    fields = config.data.to_dict()
    start = start.with_level('' if record else fields.pop('level'))
    fields.pop('level', None)
    most = start.fields['context_size']
    fields['context_size'] = fields['context_size'] or most
    if fields['context_size'] > most:
      raise ValueError(
        f'data.context_size: expected at most {most}, the context_size of the '
        f'model, got {fields["context_size"]}'
      )
    data = language.Text.load(
      seed=config.seed, vocabulary=start.vocabulary, **fields
    )
    parts = config.training.get('num_microbatches', 1)
    return cls(start, config.init.path, config.model.to_dict(), data, parts)

  @classmethod
  def load(cls, config, record: dict) -> 'Finetune':
    """Create the task from a run's config and data record, without data."""
    start = Start.of_record(record)
    return cls(start, config.init.path, config.model.to_dict(), None)

  def record(self) -> dict:
    """Return what identifies the data and what using the model requires."""
    return {
      **super().record(),
      'level': _level(self.vocabulary),
      'model': self._start.fields,
      'init': self._start.origin,
    }

  def describe(self) -> str:
    return f'{super().describe()}; model of {self._start.origin}'

  @functools.cached_property
  def pretrained(self) -> dict:
    """The parameters to start from, in float32.

    Raises:
      ValueError: they are not those of the model, or those that the run once
        started from are not there any more.
      OSError: a file cannot be read.
    """
    start = self._start
    if start.params is None:
      start = Start.read(self._path)
      if start.origin != self._start.origin:
        raise ValueError(
          f'init.path: this run started from {self._start.origin}, but there '
          f'is {start.origin}; choose another --workdir'
        )
    expected, _ = hk.data_structures.partition(
      lambda *leaf: not lora.is_adapter(*leaf),
      jax.eval_shape(self.init, jax.random.key(0)),
    )
    wrong = differences(_shapes(start.params), _shapes(expected))
    if wrong:
      raise ValueError(f'model of {start.origin}: {"; ".join(wrong)}')
    return start.params


def _shapes(params):
  return {
    f'{module}/{name}': tuple(x.shape)
    for module, name, x in hk.data_structures.traverse(params)
  }


def _level(vocabulary):
  return _LEVELS[type(vocabulary)]
