"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import jax
import pytest

from attention.training import host_memory

_CODE = """
import ctypes, resource, runpy, sys, threading
import jax

jax.config.update('jax_platforms', 'cpu')
keep = runpy.run_path(sys.argv[1])['keep_freed_memory']
is_kept = sys.argv[2] == 'kept' and keep()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use():
  for _ in range(2):  # as temporaries of a step, in threads of XLA
    block = libc.malloc(2**26)
    libc.memset(block, 1, 2**26)
    libc.free(block)

def run():
  thread = threading.Thread(target=use)
  thread.start()
  thread.join()

run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run()
print(is_kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_hosts_of_accelerators_are_left_alone(monkeypatch):
  monkeypatch.setattr(
    host_memory.ctypes, 'CDLL', lambda _: pytest.fail('malloc is changed')
  )
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', 'cuda,cpu')
  try:
    assert not host_memory.keep_freed_memory()
  finally:
    jax.config.update('jax_platforms', before)


def test_large_blocks_are_not_cleared_again():
  faults = {}
  for name in ('kept', 'returned'):
    command = [sys.executable, '-c', _CODE, host_memory.__file__, name]
    is_kept, count = subprocess.check_output(command, text=True).split()
    faults[is_kept] = int(count)
  if platform.libc_ver()[0] == 'glibc':
    assert faults['True'] < 500 < faults['False']
  else:  # other libraries have no mallopt
    assert faults.keys() == {'False'}
