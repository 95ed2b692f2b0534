"""Training one run with several processes, on one host or many."""

import contextlib
import os
import sys

import jax
from jax.experimental import multihost_utils

# A process that sends no heartbeat for this long is considered dead.
_HEARTBEAT_SECONDS = 30


def start(coordinator: str, num_processes: int, process_id: int) -> None:
  """Connect to the other processes, if any. Call this before JAX is used.

  Args:
    coordinator: 'host:port' of process 0. If '', it is detected under SLURM,
      Kubernetes and Cloud TPU; elsewhere the run has a single process.
    num_processes: total number of processes; 0 to detect it.
    process_id: index of this process, from 0; -1 to detect it.

  Raises:
    ValueError: only some of the arguments are given, or `process_id` is out of
      range.
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
  """Whether a cluster manager started this process as one of several."""
  return (
    int(os.environ.get('SLURM_STEP_NUM_TASKS', 1)) > 1
    or 'JOB_COMPLETION_INDEX' in os.environ  # a Kubernetes indexed job
    or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')
    or ',' in os.environ.get('TPU_PROCESS_ADDRESSES', '')
    or 'MEGASCALE_COORDINATOR_ADDRESS' in os.environ
  )


def is_first() -> bool:
  """Whether this is process 0, which prints and writes the shared files."""
  return jax.process_index() == 0


def gather(tree):
  """Gather whole arrays in every process. All processes must call this."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def exit_if_peer_lost():
  """Report the loss of another process and exit.

  The exit is immediate: a regular shutdown would wait a long time for the lost
  process.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    reason = ' '.join(str(error).split())[:200]
    print(
      f'error: another process of this run has ended ({reason}); restart all '
      'processes to resume from the last checkpoint',
      file=sys.stderr,
      flush=True,
    )
    os._exit(1)
