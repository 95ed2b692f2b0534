"""config.training: the length of a run and how it is executed."""

import dataclasses

from attention.modules.fields import hint
from attention.training.optimization import precision

_POSITIVE = (
  'steps',
  'log_every',
  'eval_every',
  'checkpoint_every',
  'num_kept',
  'max_bad_steps',
  'num_microbatches',
  'steps_per_call',
  'cpu_devices',
)


def _mesh():
  # See sharding.make_mesh.
  return {'data': -1, 'fsdp': 1, 'tensor': 1, 'context': 1, 'pairs': 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """The keys of config.training, with their defaults.

  The keys in `FREE` affect no result of a run apart from its length, so a run
  may resume with other values for them.
  """

  steps: int
  log_every: int  # in steps, as are the next two
  eval_every: int
  checkpoint_every: int
  num_kept: int = 3  # number of newest checkpoints kept, besides the best
  cpu_devices: int = 2  # virtual devices that share a batch on CPU
  mesh: dict = dataclasses.field(default_factory=_mesh)
  max_bad_steps: int = 5  # consecutive non-finite steps that end the run
  # 'params=float32,compute=bfloat16,output=float32', or 'products=bfloat16'
  precision: str = ''
  deterministic: bool = False  # same bits in every run on GPU; slower
  keep_memory: bool = False  # on CPU: faster with large temporaries
  tensorboard: bool = True  # write tb/ if tensorboardX is installed
  num_microbatches: int = 1  # parts of a batch; gradients are accumulated
  steps_per_call: int = 1  # the most steps that one program runs in a loop

  FREE = (
    'steps',
    'log_every',
    'eval_every',
    'checkpoint_every',
    'num_kept',
    'cpu_devices',
    'mesh',
    'max_bad_steps',
    'keep_memory',
    'tensorboard',
    'steps_per_call',
  )

  def __post_init__(self):
    for key in _POSITIVE:
      if (value := getattr(self, key)) < 1:
        raise ValueError(f'training.{key}: expected 1 or more, got {value}')
    precision.parse(self.precision)
    unknown = self.mesh.keys() - _mesh()
    if unknown:
      raise ValueError(
        f'training.mesh.{min(unknown)}: no such axis; the axes are data, '
        'fsdp, tensor, context and pairs'
      )

  @classmethod
  def create(cls, training: dict) -> 'TrainingConfig':
    """Create from config.training as a dict.

    Raises:
      ValueError: an unknown or missing key, or a value out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in training:
      if key not in fields:
        raise ValueError(f'training.{key}: no such key{hint(key, fields)}')
    for key in fields:
      if key not in training and key not in cls.defaults():
        raise ValueError(f'training.{key}: missing; set it in the config')
    return cls(**training)

  @classmethod
  def defaults(cls) -> dict:
    """Return the defaults of the keys that a config may omit."""
    found = {}
    for field in dataclasses.fields(cls):
      if field.default is not dataclasses.MISSING:
        found[field.name] = field.default
      elif field.default_factory is not dataclasses.MISSING:
        found[field.name] = field.default_factory()
    return found

  @classmethod
  def complete(cls, training) -> None:
    """Add missing keys with their defaults to a config's `training`."""
    for key, value in cls.defaults().items():
      if key not in training:
        training[key] = value
