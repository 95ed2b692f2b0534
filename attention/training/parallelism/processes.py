"""Several processes, on one host or many, that train one run together."""

import contextlib
import os
import sys

import jax
from jax.experimental import multihost_utils

# A process that says nothing for so long is given up.
_HEARTBEAT_SECONDS = 30


def start(coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the other processes, where there are any; before JAX is used.

  Args:
    coordinator: 'host:port' of process 0; '': found out under SLURM,
      Kubernetes and Cloud TPU, and elsewhere there is one process.
    num_processes: how many there are in all; 0: found out.
    process_id: of this one, from 0; -1: found out.

  Raises:
    ValueError: some of these are given, and some aren't.
  """
  given = bool(coordinator), num_processes > 0, process_id >= 0
  if any(given) and not all(given):
    raise ValueError(
      '--coordinator, --num_processes, --process_id: expected all three or '
      f'none, got {coordinator!r}, {num_processes}, {process_id}'
    )
  if all(given):
    if process_id >= num_processes:
      raise ValueError(
        f'--process_id: expected less than --num_processes={num_processes}, '
        f'got {process_id}'
      )
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  elif _is_cluster():
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)


def _is_cluster():
  """Whether a cluster started this process as one of several."""
  return (
    int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or 'JOB_COMPLETION_INDEX' in os.environ  # a Kubernetes indexed job
    or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
    or ',' in os.environ.get('TPU_PROCESS_ADDRESSES', '')
    or 'MEGASCALE_COORDINATOR_ADDRESS' in os.environ
  )


def is_first() -> bool:
  """Whether this process is the one that speaks, and writes what all share."""
  return jax.process_index() == 0


def gather(tree):
  """A tree of arrays, whole in every process; all call it together."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def together():
  """Ends this process where another one has gone, and says so.

  At once: whatever would wait for the other would wait for long.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    reason = ' '.join(str(error).split())[:200]
    print(
      f'error: another process of this run has ended ({reason}); start all of '
      'them again, to go on from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)
