"""python -m attention inspect --device: programs for unattached devices."""

import importlib.util
import os
import types

import jax
import pytest

import attention.__main__ as cli
from attention.training import command_line, tasks
from attention.training.devices import (
  catalogue,
  fitting,
  hlo,
  programs,
  report,
)
from attention.training.devices.programs import Program, Training
from attention.training.optimization.step import Step
from attention.training.reporting import flops, memory
from attention.training.training_config import TrainingConfig

_TEXT = """HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(8,128)}) parameter(0)
  %dot.1 = f32[8]{0} dot(%p, %p), lhs_contracting_dims={0}
  %sum = f32[8]{0} all-reduce(%dot.1), channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %sum)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%p), kind=kLoop, calls=%compare
}

%until (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(4)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%begin (p: f32[4]) -> (f32[4], f32[8]) {
  %p = f32[4]{0} parameter(0)
  %whole = f32[8]{0} all-gather(%p), dimensions={0}
  ROOT %s = (f32[4]{0}, f32[8]{0}) custom-call(%whole), \
custom_call_target="AsyncCollectiveStart"
}

%copies (p: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%p)
  ROOT %copy.2 = f32[8]{0} copy(%p)
}

%update (p: f32[8]) -> f32[8] {
  ROOT %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
}

%compare (p: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %j), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8]{0} negate(%p)
}

%apart (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %part = bf16[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8], y: bf16[4,2]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(1)
  %cast = f32[8]{0} convert(%x)
  %k = f32[8]{0} custom-call(%x), custom_call_target="gemm"
  %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
  %u = (s32[], f32[8]{0}) while(%t), condition=%until, body=%body
  %h = (f32[4]{0}, f32[8]{0}) fusion(%x), kind=kOutput, calls=%begin
  %c = f32[8]{0} conditional(%k, %x, %x), \
branch_computations={%copies, %update}, metadata={op_name="cond"}
  %d = f32[8]{0} conditional(%k, %x), true_computation=%update, \
false_computation=%copies
  %s = ((f32[8]{0}, bf16[4,2]{1,0}), (f32[16]{0}, bf16[8,2]{1,0})) \
all-gather-start(%x, /*index=1*/%y), dimensions={0}
  %e = (f32[16]{0}, bf16[8,2]{1,0}) all-gather-done(%s)
  %a = ((f32[8]{0}), bf16[2]{0}) async-start(%x), calls=%apart
  %b = bf16[2]{0} async-done(%a)
  ROOT %copy.9 = f32[8]{0} copy(%x)
}
"""


@pytest.mark.parametrize('turns', [0, 1, 5])
def test_kernels_and_collectives_are_counted(turns):
  counts = hlo.count(_TEXT, turns)
  # The call, the copy, the updates, a fusion that begins a collective, and one
  # or two kernels per loop iteration.
  assert counts.kernels == 1 + 1 + 2 + 1 + 4 + 2 * (3 + turns)
  assert counts.copies == 1
  assert counts.collectives == {
    'all-gather': (2, 4 * 16 + 2 * 16 + 4 * 8),
    'all-reduce': (7 + turns, (7 + turns) * 4 * 8),
    'reduce-scatter': (1, 4 * 8),
  }


@pytest.mark.parametrize(
  ('needs', 'limit', 'unit', 'expected'),
  [
    (lambda n: 7 + 3 * n, 1_000, 1, 331),
    (lambda n: 7 + 3 * n, 1_000, 8, 328),
    (lambda n: 7 + max(90 + n, 5 * n), 1_000, 8, 192),  # a kink
    (lambda n: 7 + 3 * n - 400 * (n > 250), 1_000, 1, 464),  # a jump
    (lambda n: 7 + 3 * n, 40, 4, 8),
    (lambda n: 7 + 3 * n, 6, 4, 0),
    (lambda n: 7 + 3 * n, 10**9, 4, 2_000),  # the cap
  ],
)
def test_the_largest_batch_is_found_in_few_steps(needs, limit, unit, expected):
  points = {0: 7, 16: needs(16)}
  for _ in range(8):
    batch = fitting.largest(points, limit, unit, cap=2_000)
    if batch in points:
      break
    points[batch] = needs(batch)
  assert batch == expected


@pytest.mark.parametrize(
  'name', ['x100', '', 'h100:0', 'h100:2x2', 'h100:12', 'v5e', 'v5e:4']
)
def test_unknown_devices_are_reported_in_one_line(name, capsys, unset):
  words = ['inspect', '--config=configs/gpt_char.py:debug', f'--device={name}']
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: --device: expected')
  assert error.count('\n') == 1


@pytest.fixture
def unset(monkeypatch):
  """Keep the settings of JAX and libtpu unchanged."""
  monkeypatch.setattr(jax.config, 'update', lambda *_: None)
  monkeypatch.setattr(os, 'environ', dict(os.environ))


@pytest.mark.parametrize(
  ('name', 'error', 'extra'),
  [
    ('h100', NotImplementedError('no cuda'), 'devices-gpu'),
    ('v5e:2x2', RuntimeError('no libtpu'), 'devices-tpu'),
  ],
)
def test_missing_compilers_are_reported_in_one_line(
  name, error, extra, monkeypatch, capsys, unset
):
  def refuse(**_):
    raise error

  monkeypatch.setattr(catalogue.topologies, 'get_topology_desc', refuse)
  words = ['inspect', '--config=configs/gpt_char.py:debug', f'--device={name}']
  assert cli.main(words) == 2
  assert capsys.readouterr().err == (
    f'error: --device={name}: its compiler is not installed; pip install -e '
    f"'.[{extra}]'\n"
  )


def _rows(lines):
  return {line[:44].strip(): line[44:].strip() for line in lines}


class _Uncompilable:
  """A lowered program that fails to compile."""

  def __init__(self, message):
    self.message = message

  def compile(self, **_):
    raise jax.errors.JaxRuntimeError(self.message)


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    ('Shared memory size limit exceeded: requested 3\nat x', 'limit exceeded'),
    ('No PTX compilation provider is available.', "'.[devices-gpu]'"),
    ('Ran out of memory in memory space vmem. Used 20M of 16M', 'space vmem'),
  ],
)
def test_compiler_errors_are_reported_in_one_line(message, expected, cpu):
  with pytest.raises(ValueError, match='^--device=h100: ') as error:
    Program.compile(_Uncompilable(message), cpu)
  assert expected in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'message',
  [
    'Ran out of memory on HBM, the total memory required for HLO temporaries '
    '(1.50G) exceeds available HBM (1.00G).',
    'Ran out of memory in memory space hbm. Used 1.50G of 1.00G hbm.',
  ],
)
def test_size_is_read_from_out_of_memory_errors(message, cpu):
  program = Program.compile(_Uncompilable(message), cpu)
  assert program.total == 3 * 2**29 and not program.text


@pytest.fixture
def cpu():
  """This machine's CPU, posing as an h100 with 1 MiB."""
  return catalogue.Target('h100', tuple(jax.devices()[:1]), 2**20, 0.5)


def test_a_step_is_compiled_and_counted(config, cpu, monkeypatch):
  small = config(**{'model.num_layers': 1, 'training.num_microbatches': 2})
  task, compiled = tasks.create(small), []

  def watch(*arguments):
    compiled.append(Program.compile(*arguments))
    return compiled[-1]

  monkeypatch.setattr(programs, 'Program', types.SimpleNamespace(compile=watch))
  rows = _rows(report.of_training(small, task, cpu, seconds=0.0))
  (program,) = compiled
  assert rows['model FLOPs'] == f'{flops.count_step(task, task.batch(0)):,}'
  assert int(rows['kernels']) == hlo.count(program.text).kernels > 0
  assert rows['4 fits'] == memory.format_bytes(program.total)
  left = memory.format_bytes(cpu.usable - program.total)
  assert rows['total'] == '1.0 MiB'
  assert rows['available to programs, 50%'] == '512.0 KiB'
  assert rows['free'] == left


def test_other_batches_are_compiled_within_the_time_budget(
  config, cpu, monkeypatch
):
  small = config(**{'training.num_microbatches': 2})
  task = tasks.create(small)

  def compile_quickly(_, rows):
    return Program(200_000, 1_000 * rows + 60_000 * (rows > 200))

  monkeypatch.setattr(Training, 'compile', compile_quickly)
  rows = _rows(report.of_training(small, task, cpu, seconds=600.0))
  assert rows['largest batch'] == '264'
  assert rows['264 fits'] == memory.format_bytes(524_000)
  rows = _rows(report.of_training(small, task, cpu, seconds=0.0))
  assert [x for x in rows if x.endswith(' fits')] == ['4 fits']
  assert int(rows['largest batch, estimated (see --seconds)']) > 4


def test_decoding_is_compiled_with_its_cache(config, cpu):
  task = tasks.create(config())
  rows = _rows(report.of_decoding(task, cpu))
  # 8 prompt tokens and 4 generated ones, the last of which is not fed back.
  # Each of 2 layers holds 16 channels of keys and of values per token, and two
  # integers.
  assert rows['cache'] == memory.format_bytes(2 * (11 * 2 * 16 + 2) * 4)
  params = jax.eval_shape(task.init, jax.random.key(0))
  size = sum(4 * x.size for x in jax.tree.leaves(params))
  assert rows['weights'] == memory.format_bytes(size)
  assert int(rows['kernels']) > 0 < int(rows['kernels before the first token'])


def test_decoding_of_a_translator_is_compiled(cpu):
  task = tasks.create(command_line.load_config('configs/dates.py:debug'))
  rows = _rows(report.of_decoding(task, cpu))
  assert int(rows['kernels']) > 0 and rows['cache'] != '0 B'


def test_tasks_that_generate_no_text_raise(cpu):
  with pytest.raises(ValueError, match='expected a task that generates text'):
    next(report.of_decoding(object(), cpu))


_COMPILERS = {
  'h100:2': ('jax_cuda12_plugin', 'jax_cuda13_plugin'),
  'v5e:2x2': ('libtpu',),
}


@pytest.mark.parametrize('device', _COMPILERS)
def test_a_step_is_compiled_for_unattached_devices(
  device, config, text, python
):
  if not any(map(importlib.util.find_spec, _COMPILERS[device])):
    pytest.skip(f'the compiler for {device} is not installed')
  output, error = python(
    *('-m', 'attention', 'inspect', f'--device={device}', '--seconds=0'),
    '--config=configs/gpt_char.py:debug',
    '--config.model.num_layers=1',
    f'--config.data.path={text}',
  ).communicate()
  assert 'error' not in error
  rows = _rows(output.splitlines())
  small = config(**{'model.num_layers': 1})
  task = tasks.create(small)
  settings = TrainingConfig.create(small.training.to_dict())
  step = Step.create(small, settings, task, jax.devices()[:1])
  # Gradients, loss and token count are reduced as one vector.
  size = memory.bytes_per_device(step.like['params']) + 2 * 4
  assert rows['1 × all-reduce'] == memory.format_bytes(size)
  assert int(rows['kernels']) > int(rows['of which copies'])
  if device == 'h100:2':  # TPUs pad arrays to tiles
    batch = sum(x.size * x.itemsize for x in task.batch(0).values())
    state = memory.bytes_per_device(step.like) + batch // 2 + 4
    name = 'parameters, optimizer state, batch'
    assert rows[name] == memory.format_bytes(state)
