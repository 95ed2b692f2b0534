"""GPUs and TPU slices, by name, to compile programs for."""

import dataclasses
import os
import pathlib
import re

import jax
from jax.experimental import topologies

_FOLDER = pathlib.Path(__file__).parent
_GPUS = sorted(path.stem for path in _FOLDER.glob('*.txtpb'))
_GPUS_A_HOST = 8
# GiB available to programs per device, as libtpu's compiler reports it.
_TPUS = {'tpu7x': 94.75, 'v5e': 15.75, 'v5p': 95.74, 'v6e': 31.25}
# Autotuning would have to run programs. Without it, cuBLAS is the better guess
# for matrix products, and XLA's Triton backend has no default for some.
_GPU_OPTIONS = {
  'xla_gpu_autotune_level': 0,
  'xla_gpu_enable_triton_gemm': False,
}
# Variables that libtpu expects on a TPU host; other processes may load it too.
_TPU_SETTINGS = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


@dataclasses.dataclass(frozen=True)
class Target:
  """Identical devices to compile for, and the compiler options for them."""

  name: str  # such as 'h100:8'
  devices: tuple  # JAX devices to build meshes from; they cannot run programs
  memory: int  # bytes per device
  share: float  # fraction of the memory available to programs
  options: dict | None = None  # compiler options

  @property
  def kind(self) -> str:
    """JAX's name of the devices, such as 'NVIDIA H100 80GB HBM3'."""
    return self.devices[0].device_kind

  @property
  def usable(self) -> int:
    """Bytes per device that are available to programs."""
    return int(self.memory * self.share)


def find(name: str) -> Target:
  """Find devices by name. Call this before JAX is used.

  This makes JAX run on the CPU, disables its compilation cache (it could not
  read such programs back), and sets the environment variables that libtpu
  expects.

  Args:
    name: a GPU ('h100'), several GPUs ('h100:8', 'h100:16' on two hosts), or a
      TPU slice ('v5e:4x4', 'v5p:2x2x1').

  Raises:
    ValueError: the device is unknown, or its compiler is not installed.
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
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'  # show only compiler errors
  # Recording tracebacks of operations takes a tenth of the compile time.
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
  # The fraction that JAX preallocates, read from the same variables as in JAX.
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
  # A host has four chips, except in a slice of a single chip.
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
  """Make the error for a device whose compiler is missing or incomplete."""
  extra = 'devices-gpu' if name.partition(':')[0] in _GPUS else 'devices-tpu'
  return ValueError(
    f'--device={name}: its compiler is not installed; pip install '
    f"-e '.[{extra}]'"
  )
