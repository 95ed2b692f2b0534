"""GPUs and slices of TPUs, by name, for programs to be compiled for."""

import dataclasses
import os
import pathlib
import re

import jax
from jax.experimental import topologies

_FOLDER = pathlib.Path(__file__).parent
_GPUS = sorted(path.stem for path in _FOLDER.glob('*.txtpb'))
_GPUS_A_HOST = 8
# GiB that programs can have of one device, as libtpu's compiler reports them.
_TPUS = {'tpu7x': 94.75, 'v5e': 15.75, 'v5p': 95.74, 'v6e': 31.25}
# Tuning would run programs.
_GPU_OPTIONS = {'xla_gpu_autotune_level': 0}
# What libtpu looks for on a host with TPUs; it may be loaded by others too.
_TPU_SETTINGS = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices that are alike, and what programs are compiled with for them."""

  name: str  # such as 'h100:8'
  devices: tuple  # of JAX, to make meshes of; nothing can run on them
  memory: int  # bytes that one has
  share: float  # of its memory that programs can have
  options: dict | None = None  # of the compiler

  @property
  def kind(self) -> str:
    """What JAX calls them, such as 'NVIDIA H100 80GB HBM3'."""
    return self.devices[0].device_kind

  @property
  def usable(self) -> int:
    """Bytes of a device's memory that programs can have."""
    return int(self.memory * self.share)


def find(name: str) -> Target:
  """The devices of a name; before JAX is used.

  JAX then runs on the CPU, keeps no compiled programs (it couldn't read them
  again), and libtpu finds the environment variables that it looks for.

  Args:
    name: a GPU ('h100'), several of them ('h100:8', 'h100:16' on two hosts), or
      a slice of TPUs ('v5e:4x4', 'v5p:2x2x1').

  Raises:
    ValueError: no such device, or its compiler isn't installed.
  """
  kind, _, size = name.partition(':')
  is_gpu = kind in _GPUS and re.fullmatch(r'[1-9]\d*', size or '1')
  is_tpu = kind in _TPUS and re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', size)
  if not is_gpu and not is_tpu:
    raise ValueError(
      f'--device: expected one of {", ".join(_GPUS)}, such as h100 or h100:8, '
      f'or a slice of {", ".join(_TPUS)}, such as v5e:4x4 or v5p:2x2x1, got '
      f'{name!r}'
    )
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'  # errors only, of compilers
  # Tracebacks of operations take a tenth of the time to compile.
  jax.config.update('jax_traceback_in_locations_limit', 0)
  return (
    _find_gpus(name, kind, int(size or 1)) if is_gpu else _find_tpus(name, kind)
  )


def _find_gpus(name, kind, count):
  hosts = max(1, count // _GPUS_A_HOST)
  if count > _GPUS_A_HOST and count % _GPUS_A_HOST:
    raise ValueError(
      f'--device: expected up to {_GPUS_A_HOST} GPUs or a multiple of '
      f'{_GPUS_A_HOST}, got {name!r}'
    )
  text = (_FOLDER / f'{kind}.txtpb').read_text()
  try:
    found = topologies.get_topology_desc(
      platform='cuda',
      topology_name=kind,
      topology=f'1x{hosts}x{count // hosts}',
      target_config=text,
    )
  except NotImplementedError:
    raise missing(name) from None
  memory = int(re.search(r'device_memory_size: (\d+)', text)[1])
  # As JAX reads it; what it allocates at the start of a process.
  share = os.environ.get(
    'XLA_CLIENT_MEM_FRACTION',
    os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', ''),
  )
  return Target(
    name, tuple(found.devices), memory, float(share or 0.75), _GPU_OPTIONS
  )


def _find_tpus(name, kind):
  for key, value in _TPU_SETTINGS.items():
    os.environ.setdefault(key, value)
  # A host has four chips unless there is one.
  is_one = set(name.partition(':')[2].split('x')) == {'1'}
  hosts = {'chips_per_host_bounds': (1, 1, 1)} if is_one else {}
  try:
    found = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **hosts
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f'--device={name}: {error}') from None
  except RuntimeError:
    raise missing(name) from None
  return Target(name, tuple(found.devices), int(_TPUS[kind] * 2**30), 1.0)


def missing(name: str) -> ValueError:
  """The error of a device whose compiler isn't installed, or isn't whole."""
  extra = 'devices-gpu' if name.partition(':')[0] in _GPUS else 'devices-tpu'
  return ValueError(
    f"--device={name}: its compiler isn't installed; pip install "
    f"-e '.[{extra}]'"
  )
