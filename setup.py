"""Builds the kernels for CPUs; the rest is declared in pyproject.toml."""

import importlib.util
import pathlib

from setuptools import Extension, setup

folder = pathlib.Path('attention/ops/cpu_kernels')
# XLA's headers are part of jaxlib. Without them or a compiler, the package
# installs without the kernels.
jaxlib = importlib.util.find_spec('jaxlib')
kernels = (
  [
    Extension(
      'attention.ops.cpu_kernels.kernels',
      [str(path) for path in sorted(folder.glob('*.cc'))],
      depends=[str(path) for path in folder.glob('*.h')],
      include_dirs=[f'{jaxlib.submodule_search_locations[0]}/include'],
      extra_compile_args=[
        '-std=c++17',
        '-O3',
        '-fno-math-errno',  # so that loops over square roots become vectors
        '-Wno-psabi',
        '-Wno-sign-compare',
      ],
      optional=True,
    )
  ]
  if jaxlib
  else []
)

setup(ext_modules=kernels)
