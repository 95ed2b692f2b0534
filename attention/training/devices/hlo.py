"""Count the kernels and collectives in the HLO text of a compiled program."""

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
# Attributes that name the computations an instruction runs.
_CALLED = re.compile(r'\b(?:to_apply|calls)=%?([\w.\-]+)')
_BODY = re.compile(r'\b(?:body|condition)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'_computations?=(%?[\w.\-]+|\{[^}]*\})')
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_STARTED = 'custom_call_target="AsyncCollectiveStart"'
_CONDITION = re.compile(r'\bcondition=%?([\w.\-]+)')
_LIMIT = re.compile(r' = s32\[\]\S* constant\((\d+)\)')


@dataclasses.dataclass(frozen=True)
class Counts:
  """Operations per execution of a program on one device."""

  kernels: int  # including copies
  copies: int
  collectives: dict[str, tuple[int, int]]  # (number, bytes) by kind


class _Instruction(NamedTuple):
  kind: str
  num_bytes: int  # size of the result
  operands: list[str]
  text: str  # the rest of the line, starting with the operands


def count(text: str, turns: int = 1) -> Counts:
  """Count a program's operations, multiplied by the iterations of loops.

  Args:
    text: text of a compiled program, from `as_text()`.
    turns: number of iterations assumed for loops whose trip count is unknown.

  Returns:
    The counts. Kernels are fusions, library calls and other operations that the
    device launches one by one. The bytes of a collective are the larger of its
    input and output. Of the branches of a conditional, the one with the most
    kernels other than copies is counted.
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
      return {'computing': 1} | of_fused(kind, text)
    if kind == 'copy':
      return {'copies': 1}
    if kind == 'while':
      times = _iterations(text, computations) or turns
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
    # The operands of an asynchronous collective are at its start instruction.
    source = beside[instruction.operands[0]] if name != kind else instruction
    taken = sum(beside[x].num_bytes for x in source.operands)
    return {name: 1, (name, 'bytes'): max(taken, instruction.num_bytes)}

  def of_fused(kind, text):
    """A collective that a TPU starts in a fusion, to overlap with others."""
    lines = computations[_CALLED.search(text)[1]] if kind == 'fusion' else ()
    if not any(_STARTED in line for line in lines):
      return {}
    beside = _parse(lines)
    return next(
      of_instruction(x, beside)
      for x in beside.values()
      if x.kind in _COLLECTIVES
    )

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


def _iterations(text, computations):
  """Return a loop's iterations, or None if they are unknown."""
  if known := _TURNS.search(text):
    return int(known[1])
  # TPU programs do not say; loops of JAX count up to a constant.
  limits = {
    found[1]
    for line in computations[_CONDITION.search(text)[1]]
    if (found := _LIMIT.search(line))
  }
  return int(limits.pop()) if len(limits) == 1 else None


def _split(text):
  """Return ({computation: lines}, name of the entry computation)."""
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
  """Return {name: instruction}, in order."""
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
  """Return the bytes of a shape such as 'f32[4,8]{1,0}', or of a tuple."""
  bits = 0
  for dtype, sizes in re.findall(r'\b([a-z]+[a-z\d]*)\[([\d,]*)\]', shape):
    width = re.search(r'\d+', dtype)
    each = int(width[0]) if width else 8 * (dtype == 'pred')
    bits += each * math.prod(int(n) for n in sizes.split(',') if n)
  return bits // 8
