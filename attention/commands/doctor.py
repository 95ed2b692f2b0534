"""Print versions, devices and the implementations attention dispatches to."""

import statistics
import time

import jax
import jax.numpy as jnp

import attention
from attention.ops import cpu_kernels, products
from attention.ops.platforms import PLATFORMS
from attention.training.optimization import precision
from attention.training.workdir import run_files

_BFLOAT16 = 'products=bfloat16'
_ROUNDS = 9


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
  """Say how fast products of bfloat16 operands are, and whether to use them."""
  speed = measure_bfloat16_products()
  advice = 'keep float32'
  if speed > 1.1:
    advice = f'--config.training.precision={_BFLOAT16}'
  return f'{speed:.2g} × the speed of float32: {advice}'


def measure_bfloat16_products() -> float:
  """Measure the speed of a training step's products, relative to float32."""
  x, weights = jnp.ones((1024, 256)), jnp.ones((256, 1024))

  def loss(x, weights):
    return jnp.square(products.dot(x, weights)).sum()

  programs = {}
  for policy in ('', _BFLOAT16):
    with precision.applied(policy):
      lowered = jax.jit(jax.grad(loss, (0, 1))).lower(x, weights)
    programs[policy] = precision.compile(lowered, policy, 'cpu')
  seconds = {policy: [] for policy in programs}
  for _ in range(_ROUNDS):
    for policy, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(x, weights))
      seconds[policy].append(time.perf_counter() - start)
  medians = {policy: statistics.median(s) for policy, s in seconds.items()}
  return medians[''] / medians[_BFLOAT16]
