"""Print versions, devices and the implementations attention dispatches to."""

import pathlib

import jax
import jax.numpy as jnp

import attention
from attention.ops import cpu_kernels
from attention.ops.platforms import PLATFORMS
from attention.training.workdir import run_files

_CPU_INFO = pathlib.Path('/proc/cpuinfo')
_BFLOAT16_FLAGS = ('amx_bf16', 'avx512_bf16')


def add_flags(parser) -> None:
  """Add the flags to an `argparse` parser."""
  del parser  # none


def run(_) -> int:
  """Run the command; returns the exit status."""
  for name, version in run_files.versions().items():
    print(f'{name:<18}{version}')
  print(f'{"backend":<18}{jax.default_backend()}')
  for device in jax.devices():
    print(f'{"device":<18}{device.id}: {device.device_kind}')
  if jax.default_backend() == 'cpu':
    print(f'{"bfloat16 products":<18}{bfloat16_products()}')
    print(f'{"CPU kernels":<18}{kernels()}')
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jax.ShapeDtypeStruct((8, 1024, 8, 64), dtype)
    reasons = attention.explain(x, x, x, is_causal=True)
    print(f'\ncausal attention, {jnp.dtype(dtype).name} [8, 1024, 8, 64]:')
    for implementation, reason in reasons:
      print(f'  {implementation:<16}{reason}')
  print('\nthe same in bfloat16, by platform:')
  for platform in PLATFORMS:
    reasons = attention.explain(x, x, x, is_causal=True, platform=platform)
    chosen = [name for name, reason in reasons if reason == 'chosen']
    print(f'  {platform:<16}{chosen[0]}')
  return 0


def kernels() -> str:
  """Say which instructions the C++ kernels use, or why there are none."""
  reason = cpu_kernels.reason()
  return f'no: {reason}' if reason else cpu_kernels.instruction_set()


def bfloat16_products() -> str:
  """Say whether the processor has instructions for products of bfloat16."""
  info = _CPU_INFO.read_text() if _CPU_INFO.exists() else ''
  lists = [line for line in info.splitlines() if line.startswith('flags')]
  if not lists:  # not Linux, or another kind of processor
    return 'unknown for this processor'
  found = [flag for flag in _BFLOAT16_FLAGS if flag in lists[0].split()]
  if not found:
    return 'no: this processor has none of ' + ', '.join(_BFLOAT16_FLAGS)
  flag = '--config.training.precision=products=bfloat16'
  return f'yes ({", ".join(found)}): {flag}'
