"""Benchmark attention on GPUs and TPUs, or compile it for ones not attached.

  python benchmarks/accelerators.py [WORKLOAD ...] [--quick] [--json=FILE]
  python benchmarks/accelerators.py --device=a100,h100,v5e:2x2 [WORKLOAD ...]
  python benchmarks/accelerators.py --check

The workloads are attention with a pair bias and key lengths, causal attention,
an Evoformer block and a training step of GPT-2, all in bfloat16. Each workload
runs in its own process, and its peers take turns. Times are medians over
rounds. Each round averages many repetitions in one compiled program, whose
outputs are its next inputs. `error` is the largest difference from the float32
reference, divided by the largest entry. Temporary memory is XLA's
`memory_analysis`, peak memory the device's `memory_stats`.

The peers of attention are JAX's cuDNN attention, tokamax and
cuequivariance-jax. Of the last, `triangle_attention` is measured, because
`attention_pair_bias` is a whole layer with projections. --quick measures three
workloads. --check runs the contract tests of attention on the device and checks
the numerical errors of the workloads without timing them. Its exit status is 1
if any result is wrong. --peers limits the peers, by names such as
default,cudnn,tokamax.

With --device, or if no accelerator is attached, the workloads are compiled for
the device but not run. The table then shows the kernels launched per pass, the
temporary memory, and its ratio to the size of inputs, output and cotangent.
This needs the device's compiler, like `python -m attention inspect --device`,
and excludes peers that need the device itself (cuDNN).
"""

# ruff: noqa: E402
import pathlib
import sys

# Without this, attention.py beside this script would shadow the library.
_HERE = pathlib.Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != _HERE]

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import time
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from attention.training.devices import catalogue, hlo, programs

sys.path.append(str(_HERE))
import accelerator_works as works

_QUICK = ('pair256', 'causal4096', 'gpt2_layer')
_DEVICES = 'a100,h100,v5e:2x2'
_PACKAGES = (
  'jax',
  'jaxlib',
  'jax-cuda12-plugin',
  'jax-cuda13-plugin',
  'libtpu',
  'tokamax',
  'cuequivariance-jax',
)
_TESTS = (
  'tests/ops/implementations/fused_test.py',
  'tests/ops/dot_product_test.py',
)
# Limits for our attention: kernels, and the ratio of temporary memory to inputs
# and outputs.
_LIMITS = {'forward': (8, 1.1), 'gradient': (16, 2.5)}
# Limit of its error. Twice the error of the bfloat16 reference is allowed if
# that is larger, because errors accumulate in a block.
_ERROR = 2e-2
# Table columns by key of a row: header and number format.
_COLUMNS = {
  'work': ('workload', '{}'),
  'pass': ('pass', '{}'),
  'peer': ('peer', '{}'),
  'ms': ('ms', '{:.3f}'),
  'times_ours': ('times\nours', '{:.2f}'),
  'error': ('error', '{:.1e}'),
  'kernels': ('kernels', '{}'),
  'temporary_mib': ('temporary\nMiB', '{:.2f}'),
  'times_outside': ('times in\nand out', '{:.2f}'),
  'peak_mib': ('peak\nMiB', '{:.0f}'),
  'limits': ('limits', '{}'),
}
_TURN = 0.1  # minimum seconds per turn of a peer


def run_in_process(function, *arguments):
  """Call a function in a new process, which may crash."""
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, context) as pool:
    return pool.submit(function, *arguments).result()


def reason(error):
  text = str(error).strip() or 'no reason given'
  return f'{type(error).__name__}: {text.splitlines()[0]}'


def describe(name):
  """Describe the device and the versions of the compared packages."""
  is_here = name == 'here'
  kind = jax.devices()[0].device_kind if is_here else catalogue.find(name).kind
  words = [kind]
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      words.append(f'{package} {importlib.metadata.version(package)}')
  return ', '.join([*words, str(datetime.date.today())])


def make_rows(work_name, work, chosen, excluded=''):
  """Create a row for each pass and each peer that is chosen."""
  peers = [
    peer
    for peer in work.peers
    if not (excluded and excluded in peer)
    if not chosen or peer in chosen
  ]
  if not peers:
    raise ValueError(
      f'--peers: expected some of {", ".join(work.peers)}, got '
      f'{", ".join(chosen)}'
    )
  return [
    {'work': work_name, 'pass': name, 'peer': peer}
    for name in work.passes
    for peer in peers
  ]


@contextlib.contextmanager
def record_failure(row):
  """Record an exception as the row's note instead of raising it."""
  try:
    yield
  except Exception as error:
    row['note'] = reason(error)


def compiled_rows(work_name, device_name, arguments):
  """Compile a workload for a device that is not attached; returns its rows."""
  target = catalogue.find(device_name)
  work = works.create(work_name, arguments.scale)
  rows = make_rows(work_name, work, arguments.peers, excluded='cudnn')
  for row in rows:
    with record_failure(row):
      peer, name = work.peers[row['peer']], row['pass']
      compiled, outside = compile_for(target, work, peer, name)
      temporary = compiled.memory_analysis().temp_size_in_bytes
      row['kernels'] = hlo.count(compiled.as_text()).kernels
      row['temporary_mib'] = temporary / 2**20
      row['times_outside'] = temporary / outside
      if work_name in works.ATTENTION and row['peer'] == 'default':
        kernels, times = _LIMITS[name]
        fits = row['kernels'] <= kernels and row['times_outside'] <= times
        row['limits'] = 'within' if fits else 'OVER'
  return rows


def compile_for(target, work, peer, name):
  """Compile a pass; returns the program and the bytes of inputs and outputs."""
  device = target.devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(functools.partial(work.arrays, peer)),
  )
  with programs.lowering_for(jax.sharding.Mesh(np.array([device]), 'x')):
    lowered = jax.jit(work.program(peer, name)).lower(*shapes)
  compiled = lowered.compile(compiler_options=target.options)
  return compiled, works.bytes_outside(shapes, name)


def measured_rows(work_name, arguments):
  """Run a workload on the attached device; returns its rows."""
  work = works.create(work_name, arguments.scale)
  rows = make_rows(work_name, work, arguments.peers)
  # XLA tunes one program at a time, even if threads compile several.
  with futures.ThreadPoolExecutor() as pool:
    compiled = pool.map(functools.partial(compile_here, work), rows)
    repeated = list(
      pool.map(functools.partial(compile_repeated, work), rows)
      if arguments.rounds
      else [None] * len(rows)
    )
  runs = [
    (row, program, loop)
    for row, program, loop in zip(rows, compiled, repeated, strict=True)
    if 'note' not in row
  ]
  # The device's peak memory never decreases, so the smallest peers run first.
  runs.sort(key=lambda run: run[0]['temporary_mib'])
  for row, program, _ in runs:
    with record_failure(row):
      jax.block_until_ready(program(*work.arrays(work.peers[row['peer']])))
      stats = jax.devices()[0].memory_stats() or {}
      if 'peak_bytes_in_use' in stats:
        row['peak_mib'] = stats['peak_bytes_in_use'] / 2**20
  for name in work.passes:
    passed = [r for r in runs if r[0]['pass'] == name and 'note' not in r[0]]
    exact = {'work': work_name, 'pass': name, 'peer': 'float32'}
    with record_failure(exact):
      measure_errors(work, name, passed)
    rows += [exact] if 'note' in exact else []
    measure_times(work, name, passed, arguments.rounds)
  return rows


def compile_here(work, row):
  with record_failure(row):
    peer = work.peers[row['peer']]
    shapes = jax.eval_shape(functools.partial(work.arrays, peer))
    program = jax.jit(work.program(peer, row['pass'])).lower(*shapes).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    row['temporary_mib'] = temporary / 2**20
    return program


def measure_errors(work, name, runs):
  """Add to the rows the largest differences from the float32 reference."""
  if work.exact is None:
    return
  with jax.default_matmul_precision('highest'):
    expected = jax.jit(work.program(work.exact, name))(
      *works.to_float32(work.arrays(work.exact))
    )
  errors = {}
  for row, program, _ in runs:
    peer = work.peers[row['peer']]
    got = program(*work.arrays(peer))
    errors[row['peer']] = works.error(got, peer.arrange(expected))
    row['error'] = errors[row['peer']]
  limit = max(_ERROR, 2 * errors.get('reference', 0))
  for row, *_ in runs:
    if row['peer'] == 'default':
      row['limits'] = 'within' if row['error'] <= limit else 'OVER'


def measure_times(work, name, runs, rounds):
  """Time the peers in turn, and add the medians over rounds to their rows."""
  turns, seconds = {}, {}
  for row, _, loop in runs if rounds else ():
    with record_failure(row):
      turns[row['peer']] = start(work, work.peers[row['peer']], name, loop)
      seconds[row['peer']] = []
  order, rng = list(turns), random.Random(0)
  for _ in range(rounds):
    rng.shuffle(order)
    for peer in order:
      seconds[peer].append(turns[peer]())
  for row, *_ in runs:
    if row['peer'] in seconds:
      mine, ours = seconds[row['peer']], seconds.get('default', ())
      row['ms'] = statistics.median(mine) * 1e3
      if ours:
        row['times_ours'] = statistics.median(
          a / b for a, b in zip(mine, ours, strict=True)
        )


def carried(arrays, name):
  """The loop's carry: (first input, gradients of the inputs or ())."""
  inputs, *_ = arrays
  return inputs[0], inputs if name == 'gradient' else ()


def compile_repeated(work, row):
  with record_failure(row):
    peer, name = work.peers[row['peer']], row['pass']
    shapes = jax.eval_shape(functools.partial(work.arrays, peer))
    inputs, given, cotangent = shapes
    loop = jax.jit(work.repeated(peer, name), donate_argnums=0)
    return loop.lower(
      carried(shapes, name), inputs[1:], given, cotangent
    ).compile()


def start(work, peer, name, repeated):
  """Make a function that takes one turn of a peer.

  It returns the seconds per repetition.
  """
  inputs, given, cotangent = arrays = work.arrays(peer)
  carry = jax.tree.map(jnp.copy, carried(arrays, name))  # it is donated

  def run(times):
    nonlocal carry
    begin = time.perf_counter()
    for _ in range(times):
      carry = repeated(carry, inputs[1:], given, cotangent)
    jax.block_until_ready(carry)
    return time.perf_counter() - begin

  run(1)  # warm-up
  times = math.ceil(_TURN / run(1))
  return lambda: run(times) / (times * work.repeats)


def show(console, rows, title, caption):
  """Print a table of the results, then the notes of peers that failed."""
  shown = [row for row in rows if 'note' not in row]
  columns = [c for c in _COLUMNS if any(c in row for row in shown)]
  table = Table(title=title, caption=caption)
  for column in columns:
    header, style = _COLUMNS[column]
    table.add_column(header, no_wrap=style == '{}')
  for row, following in zip(shown, [*shown[1:], {}], strict=False):
    cells = (_COLUMNS[c][1].format(row[c]) if c in row else '' for c in columns)
    ends = any(row.get(c) != following.get(c) for c in ('work', 'pass'))
    table.add_row(*cells, end_section=ends)
  if shown:
    console.print(table)
  for row in rows:
    if 'note' in row:
      words = (row[c] for c in ('work', 'pass', 'peer') if c in row)
      console.print(f'{", ".join(words)}: {row["note"]}', markup=False)


def parse():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'works', nargs='*', metavar='WORKLOAD', help=', '.join(works.NAMES)
  )
  parser.add_argument(
    '--device',
    help='device to compile for, or `here` to run on the device that JAX uses, '
    f'even a CPU (default: an attached accelerator, or else {_DEVICES})',
  )
  parser.add_argument(
    '--quick', action='store_true', help='three workloads, 5 rounds'
  )
  parser.add_argument('--rounds', type=int, help='default: 11')
  parser.add_argument('--peers', type=lambda x: x.split(','), help='see above')
  parser.add_argument(
    '--check', action='store_true', help='check results without timing'
  )
  parser.add_argument('--json', help='write all results to this file')
  parser.add_argument(
    '--scale', type=int, default=1, help='divide lengths, for a quick trial'
  )
  arguments = parser.parse_args()
  unknown = sorted({*arguments.works} - {*works.NAMES})
  if unknown:
    parser.error(f'no such workload: {", ".join(unknown)}')
  if arguments.scale < 1:
    parser.error(f'--scale: expected 1 or more, got {arguments.scale}')
  if arguments.json:  # fail before measuring, not after
    try:
      pathlib.Path(arguments.json).touch()
    except OSError as error:
      parser.error(f'--json: {error}')
  if not arguments.device:
    platform = run_in_process(jax.default_backend)
    arguments.device = _DEVICES if platform == 'cpu' else 'here'
  if arguments.check and arguments.device != 'here':
    parser.error('--check: expected an accelerator, found none')
  if arguments.rounds is None:
    arguments.rounds = 5 if arguments.quick else 11
  if arguments.check:
    arguments.rounds = 0
  if not arguments.works:
    arguments.works = _QUICK if arguments.quick else works.NAMES
  return arguments


def run_tests():
  """Run the contract tests of attention; returns whether they pass."""
  words = [sys.executable, '-m', 'pytest', '-n', '0', '-q', *_TESTS]
  return subprocess.run(words, cwd=_HERE.parent).returncode == 0


def main():
  arguments = parse()
  console, results, is_good = Console(), [], True
  if not console.is_terminal:  # a narrow table would cut its numbers
    console = Console(width=120)
  if arguments.check:
    is_good = run_tests()
  for device in arguments.device.split(','):
    is_here = device == 'here'
    try:
      about = run_in_process(describe, device)
    except Exception as error:  # unknown device, or no compiler for it
      console.print(f'{device}: {reason(error)}', markup=False)
      is_good = False
      continue
    rows = []
    for work in arguments.works:
      print(f'{device}: {work} …', file=sys.stderr, flush=True)
      try:
        if is_here:
          rows += run_in_process(measured_rows, work, arguments)
        else:
          rows += run_in_process(compiled_rows, work, device, arguments)
      except Exception as error:  # the workload failed or its process crashed
        rows.append({'work': work, 'note': reason(error)})
    show(console, rows, device, about)
    results.append({'device': device, 'about': about, 'rows': rows})
    is_good &= not any(is_wrong(row) for row in rows)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))
  sys.exit(2 if not results else arguments.check and not is_good)


def is_wrong(row):
  """Whether our implementation failed or is over its limits."""
  is_ours = row.get('peer', 'default') == 'default'
  return is_ours and ('note' in row or row.get('limits') == 'OVER')


if __name__ == '__main__':
  main()
