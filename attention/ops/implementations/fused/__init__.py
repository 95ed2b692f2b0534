"""Attention in Pallas kernels that keep the logits in on-chip memory.

The softmax is accumulated online over key blocks (Dao et al. 2022). The
backward pass recomputes the attention weights from the largest logit and the
logarithm of the denominator. It has one kernel for the gradient of the query,
one for key and value, and one for the bias. The bias kernel loops over the
batch rows that share a tile of the bias and stores each total once. It needs no
atomics and no array of the logits' size, and its results are bitwise
reproducible.

Pallas is imported only when a kernel is lowered.
"""

import dataclasses
import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from attention.ops import cpu_kernels
from attention.ops.implementations.base import Implementation
from attention.ops.implementations.fused.operands import LOG2E

_MAX_CHANNELS = 256  # per head
_MIN_LENGTH = 64  # queries and keys, on TPUs
_MAX_SCALARS = 2**16  # in a mask, such as lengths, on TPUs: 256 KiB


def _common_refusal(query, key, value, options):
  """Why neither platform's kernels support these arguments, or None."""
  if min(*query.shape, *value.shape) == 0:
    return 'empty axes are not supported'
  if options.vector is not None:
    return 'additive similarity is not supported'
  dtypes = query.dtype, key.dtype, value.dtype
  if len(set(dtypes)) > 1:
    names = ', '.join(map(str, dtypes))
    return f'expected query, key and value of the same dtype, got {names}'
  leaves = jax.tree.leaves((query, key, value, options))
  if max(map(np.size, leaves)) >= 2**31:
    return 'expected arrays of fewer than 2^31 elements'


def _size_refusal(query, value):
  """Why the kernels for accelerators don't support these heads, or None."""
  largest = max(query.shape[-1], value.shape[-1])
  if largest > _MAX_CHANNELS:
    return f'expected at most {_MAX_CHANNELS} channels per head, got {largest}'


@functools.cache
def _has_backend(name):
  """Whether this JAX has a Pallas backend, without importing it."""
  folder = pathlib.Path(jax.__file__).parent / 'experimental' / 'pallas'
  return (folder / f'{name}.py').exists() or (folder / name).is_dir()


class _Kernels(Implementation):
  """Kernels in a submodule that is imported when they are lowered."""

  module: str

  def of_blocks(self, *_):
    return _InNats(self)

  def forward(self, *arguments):
    return self._module.forward(self, *arguments)

  def backward(self, *arguments):
    return self._module.backward(self, *arguments)

  @property
  def _module(self):
    return importlib.import_module(f'{__name__}.{self.module}')


@dataclasses.dataclass(frozen=True)
class _InNats(Implementation):
  """Kernels, whose residuals are base 2, with natural logarithms."""

  kernels: Implementation

  def forward(self, *arguments):
    output, *residuals = self.kernels.forward(*arguments)
    return output, *(x / LOG2E for x in residuals)

  def backward(self, query, key, value, options, output, *residuals_and_output):
    *residuals, d_output = residuals_and_output
    residuals = [x * LOG2E for x in residuals]
    return self.kernels.backward(
      query, key, value, options, output, *residuals, d_output
    )


@dataclasses.dataclass(frozen=True)
class Triton(_Kernels):
  """Pallas Triton kernels for NVIDIA GPUs, Ampere or later."""

  interpret: bool = False  # on a CPU, as plain JAX
  module = 'gpu'

  def refusal(self, query, key, value, options):
    if not _has_backend('triton'):
      return f'JAX {jax.__version__} has no Pallas Triton backend'
    return _size_refusal(query, value) or _common_refusal(
      query, key, value, options
    )


@dataclasses.dataclass(frozen=True)
class Tpu(_Kernels):
  """Pallas Mosaic kernels for TPUs.

  Relative position biases need TPU v5 or later.
  """

  interpret: bool = False  # on a CPU, as plain JAX
  most: int = 512  # largest block, in positions
  module = 'tpu'

  def refusal(self, query, key, value, options):
    if query.dtype == jnp.float16:
      return 'expected float32 or bfloat16, got float16'
    lengths = query.shape[-3], key.shape[-3]
    if min(lengths) < _MIN_LENGTH:
      return (
        f'expected at least {_MIN_LENGTH} queries and keys, got {lengths[0]} '
        f'and {lengths[1]}; shorter inputs waste most of a 128 × 128 tile'
      )
    scalars = 0 if options.mask is None else options.mask.numbers
    if scalars > _MAX_SCALARS:
      return (
        f'expected at most {_MAX_SCALARS} scalars in the mask, got {scalars}; '
        'scalar memory holds no more'
      )
    return _size_refusal(query, value) or _common_refusal(
      query, key, value, options
    )


@dataclasses.dataclass(frozen=True)
class Cpu(_Kernels):
  """C++ kernels for CPUs, where a compiler has built them."""

  module = 'cpu'

  def refusal(self, query, key, value, options):
    return (
      cpu_kernels.reason()
      or self._module.refusal(query, key, options)
      or _common_refusal(query, key, value, options)
    )
