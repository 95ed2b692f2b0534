"""Programs compiled for described devices, and the memory that they need."""

import dataclasses
import re

import jax

from attention.training.devices import catalogue
from attention.training.optimization import precision
from attention.training.optimization.step import Step
from attention.training.parallelism import sharding
from attention.training.training_config import TrainingConfig

# How libtpu's compiler says that a program is too large, in GiB or less.
_TOO_LARGE = re.compile(
  r'Ran out of memory .*?hbm.*? (?:Used |\()([\d.]+)([KMGT]?)\b', re.IGNORECASE
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, or what is known of one that is too large."""

  arguments: int  # bytes; results are written over them where they can be
  temporaries: int  # bytes, with other results and code
  text: str = ''  # none if the compiler gave up for want of memory

  @classmethod
  def compile(cls, lowered, target) -> 'Program':
    """Compiles for a target's devices.

    Raises:
      ValueError: the compiler can't; in one line, what it says.
    """
    try:
      compiled = lowered.compile(compiler_options=target.options)
    except jax.errors.JaxRuntimeError as error:
      message = str(error)
      if found := _TOO_LARGE.search(message):
        return cls(0, int(float(found[1]) * _UNITS[found[2]]))
      if 'PTX compilation provider' in message or 'libdevice' in message:
        raise catalogue.missing(target.name) from None
      raise ValueError(
        f"--device={target.name}: the program doesn't compile: "
        f'{message.strip().splitlines()[0][:300]}'
      ) from None
    memory = compiled.memory_analysis()
    return cls(
      memory.argument_size_in_bytes,
      memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.generated_code_size_in_bytes,
      compiled.as_text(),
    )

  @property
  def total(self) -> int:
    """Bytes of a device."""
    return self.arguments + self.temporaries


class Training:
  """A config's training step, for batches of any size."""

  def __init__(self, config, task, target):
    """Chooses the mesh among the target's devices.

    Raises:
      ValueError: as `Step.create`.
    """
    self.settings = TrainingConfig.create(config.training.to_dict())
    self.batch = task.batch(0)
    if self.settings.deterministic and target.options:  # of GPUs
      options = target.options | {'xla_gpu_deterministic_ops': True}
      target = dataclasses.replace(target, options=options)
    self.target = target
    self.step = Step.create(config, self.settings, task, target.devices)
    self.mesh = self.step.mesh

  @property
  def rows(self) -> int:
    """The size of the config's batch."""
    return len(next(iter(self.batch.values())))

  @property
  def unit(self) -> int:
    """What divides a batch on this mesh."""
    shape = self.mesh.shape
    return shape['data'] * shape['fsdp'] * self.settings.num_microbatches

  def compile(self, rows: int) -> Program:
    """The step for batches of that size.

    Raises:
      ValueError: as `Program.compile`.
    """
    placed = sharding.batched(self.mesh)
    batch = {
      name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=placed)
      for name, x in self.batch.items()
    }
    with precision.applied(self.settings.precision), described(self.mesh):
      lowered = self.step.lower(batch)
    return Program.compile(lowered, self.target)


def described(mesh):
  """Where kernels are lowered for devices that aren't attached."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
