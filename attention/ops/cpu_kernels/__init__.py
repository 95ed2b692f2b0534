"""Kernels in C++ for CPUs, as foreign functions of XLA.

A compiler builds them when the package is installed; see setup.py. Without one,
`reason` tells why there are none, and plain XLA takes their place.

| file | holds |
|---|---|
| `attention.cc`, `product.cc` | the functions that XLA calls |
| `threads.h` | work shared by XLA's threads |
| `kernels.cc` | the kernels, for each instruction set |
| `call.h` | their arguments, which all instruction sets share |
| `vectors.h` | vectors of one instruction set, and products of blocks |
| `attention.h` | attention and its gradient, of some queries of a head |
| `product.h` | products of few rows with a large matrix |
"""

import ctypes
import functools
import pathlib
import sysconfig

import jax

_TARGETS = 'attention_forward', 'attention_backward', 'attention_product'


@functools.cache
def reason() -> str | None:
  """Register the kernels with XLA; return why they can't be used, or None."""
  path = library_path()
  if not path.exists():
    return (
      'the CPU kernels are not built; install the package with a C++ compiler '
      'at hand'
    )
  try:
    library = ctypes.CDLL(str(path))
    for target in _TARGETS:
      jax.ffi.register_ffi_target(
        target, jax.ffi.pycapsule(getattr(library, target)), platform='cpu'
      )
  except Exception as error:  # built for another machine or version of XLA
    message = str(error).splitlines()[0]
    return f'the CPU kernels cannot be loaded; install again ({message})'
  return None


def library_path() -> pathlib.Path:
  """Return where setup.py puts the kernels."""
  suffix = sysconfig.get_config_var('EXT_SUFFIX')
  return pathlib.Path(__file__).with_name(f'kernels{suffix}')


def instruction_set() -> str:
  """Return the instruction set that the kernels use on this processor.

  It is the best that the processor has, up to the one that the environment
  variable ATTENTION_INSTRUCTION_SET may name: 'AVX-512', 'AVX2' or 'baseline'.
  """
  function = ctypes.CDLL(str(library_path())).attention_instruction_set
  function.restype = ctypes.c_char_p
  return function().decode()
