"""Print versions, devices and the implementations attention dispatches to."""

import jax
import jax.numpy as jnp

import attention
from attention.ops.platforms import PLATFORMS
from attention.training.workdir import run_files


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
