"""Attention on GPUs and TPUs: times where one is attached, else what compiles.

  python benchmarks/accelerators.py [WORK ...] [--quick] [--json=FILE]
  python benchmarks/accelerators.py --device=a100,h100,v5e:2x2 [WORK ...]
  python benchmarks/accelerators.py --check

Works are in bfloat16: attention with a pair bias and key lengths, causal
attention, an Evoformer block, a training step of GPT-2. Each work runs in a
process of its own, its peers in turn: medians of rounds, each over many
repetitions in one compiled program whose outputs are its next inputs. `error`
is the largest difference from the reference in float32, over the largest entry.
Temporary memory is XLA's `memory_analysis`, peak memory the device's
`memory_stats`. JAX's cuDNN attention, tokamax and cuequivariance-jax are peers
of attention. Of the latter it is `triangle_attention`: its
`attention_pair_bias` is a whole layer, projections included. --quick measures
three works. --check runs the tests of attention's contract on the device and
looks at the works' numbers only; it exits with status 1 if any are wrong.

With --device, or where no accelerator is attached, each work is compiled for
that device and nothing runs: kernels that a pass starts, temporary memory, and
its ratio to inputs, output and cotangent. That needs the device's compiler, as
`python -m attention inspect --device` does; peers that need the device itself
(cuDNN) are left out.
"""

# ruff: noqa: E402
import pathlib
import sys

# attention.py beside this script would be found in the library's place.
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
# What attention of ours may take: kernels, and temporaries over what goes in
# and comes out.
_LIMITS = {'forward': (8, 1.1), 'gradient': (16, 2.5)}
# What its error may be, or twice the reference's in bfloat16: blocks add up.
_ERROR = 2e-2
# What rows hold, its header, and how it's written.
_COLUMNS = {
  'work': ('work', '{}'),
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
_TURN = 0.1  # seconds that a peer's turn takes at least


def in_a_process(function, *arguments):
  """What a function returns in a new process, which may crash."""
  context = multiprocessing.get_context('spawn')
  with futures.ProcessPoolExecutor(1, context) as pool:
    return pool.submit(function, *arguments).result()


def reason(error):
  text = str(error).strip() or 'no reason given'
  return f'{type(error).__name__}: {text.splitlines()[0]}'


def describe(name):
  """The device, and versions of what is compared on it."""
  is_here = name == 'here'
  kind = jax.devices()[0].device_kind if is_here else catalogue.find(name).kind
  words = [kind]
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      words.append(f'{package} {importlib.metadata.version(package)}')
  return ', '.join([*words, str(datetime.date.today())])


def each_peer(work_name, work, excluded=''):
  """A row for each pass and peer."""
  return [
    {'work': work_name, 'pass': name, 'peer': peer}
    for name in work.passes
    for peer in work.peers
    if not excluded or excluded not in peer
  ]


@contextlib.contextmanager
def failing(row):
  """A peer that fails says why in its row."""
  try:
    yield
  except Exception as error:
    row['note'] = reason(error)


def compiled_rows(work_name, device_name, arguments):
  """Rows of a work, compiled for a device that isn't here."""
  target = catalogue.find(device_name)
  work = works.create(work_name, arguments.scale)
  rows = each_peer(work_name, work, excluded='cudnn')
  for row in rows:
    with failing(row):
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
  """A pass's program, and the bytes of what goes in and comes out."""
  device = target.devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    jax.eval_shape(functools.partial(work.arrays, peer)),
  )
  with programs.described(jax.sharding.Mesh(np.array([device]), 'x')):
    lowered = jax.jit(work.program(peer, name)).lower(*shapes)
  compiled = lowered.compile(compiler_options=target.options)
  return compiled, works.bytes_outside(shapes, name)


def measured_rows(work_name, arguments):
  """Rows of a work, run on the attached device."""
  work = works.create(work_name, arguments.scale)
  rows = each_peer(work_name, work)
  compiled = [compile_here(work, row) for row in rows]
  runs = [
    (row, program)
    for row, program in zip(rows, compiled, strict=True)
    if 'note' not in row
  ]
  # The device keeps the highest peak: what takes least runs first.
  runs.sort(key=lambda run: run[0]['temporary_mib'])
  for row, program in runs:
    with failing(row):
      jax.block_until_ready(program(*work.arrays(work.peers[row['peer']])))
      stats = jax.devices()[0].memory_stats() or {}
      if 'peak_bytes_in_use' in stats:
        row['peak_mib'] = stats['peak_bytes_in_use'] / 2**20
  for name in work.passes:
    passed = [r for r in runs if r[0]['pass'] == name and 'note' not in r[0]]
    exact = {'work': work_name, 'pass': name, 'peer': 'float32'}
    with failing(exact):
      measure_errors(work, name, passed)
    rows += [exact] if 'note' in exact else []
    measure_times(work, name, [row for row, _ in passed], arguments.rounds)
  return rows


def compile_here(work, row):
  with failing(row):
    peer = work.peers[row['peer']]
    shapes = jax.eval_shape(functools.partial(work.arrays, peer))
    program = jax.jit(work.program(peer, row['pass'])).lower(*shapes).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    row['temporary_mib'] = temporary / 2**20
    return program


def measure_errors(work, name, runs):
  """Adds largest differences from the reference in float32."""
  if work.exact is None:
    return
  with jax.default_matmul_precision('highest'):
    expected = jax.jit(work.program(work.exact, name))(
      *works.to_float32(work.arrays(work.exact))
    )
  errors = {}
  for row, program in runs:
    peer = work.peers[row['peer']]
    got = program(*work.arrays(peer))
    errors[row['peer']] = works.error(got, peer.arrange(expected))
    row['error'] = errors[row['peer']]
  limit = max(_ERROR, 2 * errors.get('reference', 0))
  for row, _ in runs:
    if row['peer'] == 'default':
      row['limits'] = 'within' if row['error'] <= limit else 'OVER'


def measure_times(work, name, rows, rounds):
  """Adds medians of rounds in which all take turns."""
  turns, seconds = {}, {}
  for row in rows if rounds else ():
    with failing(row):
      turns[row['peer']] = start(work, work.peers[row['peer']], name)
      seconds[row['peer']] = []
  order, rng = list(turns), random.Random(0)
  for _ in range(rounds):
    rng.shuffle(order)
    for peer in order:
      seconds[peer].append(turns[peer]())
  for row in rows:
    if row['peer'] in seconds:
      mine, ours = seconds[row['peer']], seconds.get('default', ())
      row['ms'] = statistics.median(mine) * 1e3
      if ours:
        row['times_ours'] = statistics.median(
          a / b for a, b in zip(mine, ours, strict=True)
        )


def start(work, peer, name):
  """A function that runs a peer for a while: seconds of one repetition."""
  inputs, given, cotangent = work.arrays(peer)
  repeated = jax.jit(work.repeated(peer, name), donate_argnums=0)
  # Gradients are like inputs; copied, as they are given away.
  carry = inputs[0], inputs if name == 'gradient' else ()
  carry = jax.tree.map(jnp.copy, carry)

  def run(times):
    nonlocal carry
    begin = time.perf_counter()
    for _ in range(times):
      carry = repeated(carry, inputs[1:], given, cotangent)
    jax.block_until_ready(carry)
    return time.perf_counter() - begin

  run(1)  # compiles
  times = math.ceil(_TURN / run(1))
  return lambda: run(times) / (times * work.repeats)


def show(console, rows, title, caption):
  """A table of the figures, then why peers or works have none."""
  shown = [row for row in rows if 'note' not in row]
  columns = [c for c in _COLUMNS if any(c in row for row in shown)]
  table = Table(title=title, caption=caption)
  for column in columns:
    header, style = _COLUMNS[column]
    table.add_column(header, no_wrap=style == '{}')
  for row, following in zip(shown, [*shown[1:], {}], strict=True):
    cells = (_COLUMNS[c][1].format(row[c]) if c in row else '' for c in columns)
    ends = any(row.get(c) != following.get(c) for c in ('work', 'pass'))
    table.add_row(*cells, end_section=ends)
  console.print(table)
  for row in rows:
    if 'note' in row:
      words = (row[c] for c in ('work', 'pass', 'peer') if c in row)
      console.print(f'{", ".join(words)}: {row["note"]}', markup=False)


def parse():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('works', nargs='*', help=', '.join(works.NAMES))
  parser.add_argument(
    '--device',
    help=f'to compile for, or here: the one that JAX runs on, a CPU too; '
    f'default: an accelerator that is attached, or else {_DEVICES}',
  )
  parser.add_argument(
    '--quick', action='store_true', help='three works, 5 rounds'
  )
  parser.add_argument('--rounds', type=int, help='default: 11')
  parser.add_argument('--check', action='store_true', help='no times')
  parser.add_argument('--json', help='a file for all figures')
  parser.add_argument(
    '--scale', type=int, default=1, help='divides lengths, to try the script'
  )
  arguments = parser.parse_args()
  unknown = sorted({*arguments.works} - {*works.NAMES})
  if unknown:
    parser.error(f'no such work: {", ".join(unknown)}')
  if arguments.scale < 1:
    parser.error(f'--scale: expected 1 or more, got {arguments.scale}')
  if arguments.json:  # not after all has been measured
    try:
      pathlib.Path(arguments.json).touch()
    except OSError as error:
      parser.error(f'--json: {error}')
  if not arguments.device:
    platform = in_a_process(jax.default_backend)
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
  """Whether the tests of attention's contract pass on the device."""
  words = [sys.executable, '-m', 'pytest', '-n', '0', '-q', *_TESTS]
  return subprocess.run(words, cwd=_HERE.parent).returncode == 0


def main():
  arguments = parse()
  console, results, is_good = Console(), [], True
  if arguments.check:
    is_good = run_tests()
  for device in arguments.device.split(','):
    is_here = device == 'here'
    try:
      about = in_a_process(describe, device)
    except Exception as error:  # no such device, or no compiler for it
      console.print(f'{device}: {reason(error)}', markup=False)
      is_good = False
      continue
    rows = []
    for work in arguments.works:
      print(f'{device}: {work} …', file=sys.stderr, flush=True)
      try:
        if is_here:
          rows += in_a_process(measured_rows, work, arguments)
        else:
          rows += in_a_process(compiled_rows, work, device, arguments)
      except Exception as error:  # a work that can't be made, or a crash
        rows.append({'work': work, 'note': reason(error)})
    show(console, rows, device, about)
    results.append({'device': device, 'about': about, 'rows': rows})
    is_good &= not any(is_wrong(row) for row in rows)
  if arguments.json:
    pathlib.Path(arguments.json).write_text(json.dumps(results, indent=1))
  sys.exit(2 if not results else arguments.check and not is_good)


def is_wrong(row):
  """Whether the numbers of ours are wrong, or there are none."""
  is_ours = row.get('peer', 'default') == 'default'
  return is_ours and ('note' in row or row.get('limits') == 'OVER')


if __name__ == '__main__':
  main()
