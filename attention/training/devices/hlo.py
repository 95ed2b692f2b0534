"""What a compiled program starts and sends, counted in its text."""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

_KERNELS = (
  'convolution',
  'custom-call',
  'dot',
  'fusion',
  'reduce',
  'scatter',
  'sort',
)
_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# The computations that an instruction runs once, by its attributes.
_CALLED = re.compile(r'\b(?:to_apply|calls)=%?([\w.\-]+)')
_BODY = re.compile(r'\b(?:body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'_computations?=(%?[\w.\-]+|\{[^}]*\})')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Counts:
  """What one run of a program does on a device."""

  kernels: int  # copies too
  copies: int
  collectives: dict[str, tuple[int, int]]  # how many by kind, and their bytes


class _Instruction(NamedTuple):
  kind: str
  num_bytes: int  # of the result
  operands: list[str]
  text: str  # from the operands on


def count(text: str, turns: int = 1) -> Counts:
  """Counts what a program does, loops by their turns.

  Args:
    text: of a compiled program, as `as_text()` gives it.
    turns: of loops whose number of turns the compiler doesn't know.

  Returns:
    Kernels: fusions, calls of libraries and other operations that a device
    runs one by one. Collectives: each with the larger of what it takes and what
    it gives. Of a condition's branches, the one that computes most.
  """
  computations, entry = _split(text)
  empty = collections.Counter()

  def of_computation(name):
    instructions, total = _parse(computations[name]), collections.Counter()
    for instruction in instructions.values():
      total.update(of_instruction(instruction, instructions))
    return total

  def of_instruction(instruction, beside):
    kind, text = instruction.kind, instruction.text
    if kind in _KERNELS:
      return {'computing': 1}
    if kind == 'copy':
      return {'copies': 1}
    if kind == 'while':
      known = _TURNS.search(text)
      times = int(known[1]) if known else turns
      turn = sum(map(of_computation, _BODY.findall(text)), empty)
      return {key: times * number for key, number in turn.items()}
    if kind == 'conditional':
      names = re.findall(r'[\w.\-]+', ' '.join(_BRANCHES.findall(text)))
      return max(map(of_computation, names), key=lambda c: c['computing'])
    if kind in ('call', 'async-start'):
      return of_computation(_CALLED.search(text)[1])
    name = kind.removesuffix('-done')
    if name not in _COLLECTIVES:
      return empty
    # What began apart has its operands where it began.
    source = beside[instruction.operands[0]] if name != kind else instruction
    taken = sum(beside[x].num_bytes for x in source.operands)
    return {name: 1, (name, 'bytes'): max(taken, instruction.num_bytes)}

  total = of_computation(entry)
  return Counts(
    total['computing'] + total['copies'],
    total['copies'],
    {
      name: (total[name], total[name, 'bytes'])
      for name in _COLLECTIVES
      if total[name]
    },
  )


def _split(text):
  """({computation: its lines}, the name of the one that is run)."""
  computations, entry, lines = {}, None, []
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      start = re.match(r'(ENTRY )?%?([\w.\-]+)', line)
      lines = computations[start[2]] = []
      entry = start[2] if start[1] else entry
    else:
      lines.append(line)
  return computations, entry


def _parse(lines):
  """{name: instruction}, in order."""
  instructions = {}
  for line in lines:
    found = re.match(
      r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)', line
    )
    if found:
      name, shape, kind, rest = found.groups()
      operands = re.findall(r'%([\w.\-]+)', rest.split('), ')[0])
      instructions[name] = _Instruction(kind, _num_bytes(shape), operands, rest)
  return instructions


def _num_bytes(shape):
  """Of a shape or a tuple of them: 'f32[4,8]{1,0}'."""
  bits = 0
  for dtype, sizes in re.findall(r'\b([a-z]+[a-z\d]*)\[([\d,]*)\]', shape):
    width = re.search(r'\d+', dtype)
    each = int(width[0]) if width else 8 * (dtype == 'pred')
    bits += each * math.prod(int(n) for n in sizes.split(',') if n)
  return bits // 8
