"""Programs compiled for devices that are not attached, and their memory."""

import dataclasses
import re

import jax

from attention.training.devices import catalogue
from attention.training.optimization import precision
from attention.training.optimization.step import Step
from attention.training.parallelism import sharding
from attention.training.training_config import TrainingConfig

# libtpu's error for a program that is too large; sizes are in GiB or smaller.
_TOO_LARGE = re.compile(
  r'Ran out of memory .*?hbm.*? (?:Used |\()([\d.]+)([KMGT]?)\b', re.IGNORECASE
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, or the size of one that is too large."""

  arguments: int  # bytes, including results that reuse donated arguments
  temporaries: int  # bytes, including other results and code
  text: str = ''  # empty if the program does not fit the device's memory

  @classmethod
  def compile(cls, lowered, target) -> 'Program':
    """Compile a lowered program for a target's devices.

    Raises:
      ValueError: compilation fails; the message is the compiler's first line.
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
        f'--device={target.name}: the program does not compile: '
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
    """Bytes per device."""
    return self.arguments + self.temporaries


class Training:
  """A config's training step, compiled for batches of any size."""

  def __init__(self, config, task, target):
    """Create the step and its mesh from the target's devices.

    Raises:
      ValueError: as `Step.create`.
    """
    settings = TrainingConfig.create(config.training.to_dict())
    # One step, whose kernels and memory are reported.
    self.settings = dataclasses.replace(settings, steps_per_call=1)
    self.batch = task.batch(0)
    if self.settings.deterministic and target.options:  # GPUs have options
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
    """Batch sizes on this mesh are multiples of this number."""
    shape = self.mesh.shape
    return shape['data'] * shape['fsdp'] * self.settings.num_microbatches

  def compile(self, rows: int) -> Program:
    """Compile the step for batches of this size.

    Raises:
      ValueError: as `Program.compile`.
    """
    sharding.check_context(self.batch, self.mesh)
    batch = {
      name: jax.ShapeDtypeStruct(
        (1, rows, *x.shape[1:]),
        x.dtype,
        sharding=sharding.stacked(self.mesh, (1, *x.shape)),
      )
      for name, x in self.batch.items()
    }
    with precision.applied(self.settings.precision), lowering_for(self.mesh):
      lowered = self.step.lower(batch)
    return Program.compile(lowered, self.target)


def lowering_for(mesh):
  """Return a context that lowers kernels for devices that are not attached."""
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
