"""Attention in kernels: logits exist on the chip alone, forward and backward.

The softmax runs along blocks of keys (Dao et al. 2022); the backward pass
recomputes the weights from the largest logit and the logarithm of the
denominator: in one kernel for the query's gradient, one for key and value, and
one for the bias. The last loops over the rows of the batch that share the bias
and stores each sum once: no atomics, no array of the logits' size, the same
bits in every run.

Pallas is imported when a kernel is lowered, not before.
"""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops.implementations.base import Implementation

_LARGEST = 256  # channels a head
_SHORTEST = 64  # queries and keys on a TPU
_MOST_NUMBERS = 2**16  # of a mask, such as lengths, on a TPU: 256 KiB


def _refusal(query, key, value, options):
  """What no kernel computes."""
  if min(*query.shape, *value.shape) == 0:
    return 'an axis without positions'
  if options.vector is not None:
    return 'additive similarity is no product'
  dtypes = query.dtype, key.dtype, value.dtype
  if len(set(dtypes)) > 1:
    names = ', '.join(map(str, dtypes))
    return f'expected query, key and value of one dtype, got {names}'
  largest = max(query.shape[-1], value.shape[-1])
  leaves = jax.tree.leaves((query, key, value, options))
  if max(map(np.size, leaves)) >= 2**31:
    return 'an array of 2^31 numbers or more'
  if largest > _LARGEST:
    return f'expected at most {_LARGEST} channels a head, got {largest}'


@functools.cache
def _has_backend(name):
  """Whether this JAX has a back end of Pallas; without importing it."""
  folder = pathlib.Path(jax.__file__).parent / 'experimental' / 'pallas'
  return (folder / f'{name}.py').exists() or (folder / name).is_dir()


class _Kernels(Implementation):
  """Kernels, in a module that is imported when they are lowered."""

  module: str

  def forward(self, *arguments):
    return self._module.forward(self, *arguments)

  def backward(self, *arguments):
    return self._module.backward(self, *arguments)

  @property
  def _module(self):
    return importlib.import_module(f'{__name__}.{self.module}')


@dataclasses.dataclass(frozen=True)
class Triton(_Kernels):
  """Kernels for NVIDIA GPUs, Ampere and later: Pallas through Triton."""

  interpret: bool = False  # on a CPU, as plain JAX
  module = 'gpu'

  def refusal(self, query, key, value, options):
    if not _has_backend('triton'):
      return f'JAX {jax.__version__} has no Pallas for Triton'
    return _refusal(query, key, value, options)


@dataclasses.dataclass(frozen=True)
class Tpu(_Kernels):
  """Kernels for TPUs: Pallas through Mosaic.

  Biases by distance need a TPU v5 or later.
  """

  interpret: bool = False  # on a CPU, as plain JAX
  most: int = 512  # positions in a block
  module = 'tpu'

  def refusal(self, query, key, value, options):
    if query.dtype == jnp.float16:
      return 'expected float32 or bfloat16, got float16'
    lengths = query.shape[-3], key.shape[-3]
    if min(lengths) < _SHORTEST:
      return (
        f'expected {_SHORTEST} queries and keys or more, which tiles of 128 × '
        f'128 pay for, got {lengths[0]} and {lengths[1]}'
      )
    numbers = 0 if options.mask is None else options.mask.numbers
    if numbers > _MOST_NUMBERS:
      return (
        f'expected at most {_MOST_NUMBERS} numbers in a mask, as scalar memory '
        f'holds, got {numbers}'
      )
    return _refusal(query, key, value, options)
