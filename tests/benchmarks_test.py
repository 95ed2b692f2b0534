"""Benchmarks time the computations that they claim to."""

import importlib.util
import pathlib

import jax
import pytest

_FILE = pathlib.Path(__file__).parents[1] / 'benchmarks/accelerator_works.py'


@pytest.mark.parametrize(('name', 'passes'), [('forward', 2), ('gradient', 1)])
def test_repetitions_compute_every_product(name, passes):
  spec = importlib.util.spec_from_file_location('works', _FILE)
  works = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(works)
  work = works.create('pair256', scale=16)
  peer = work.peers['reference']
  inputs, given, cotangent = work.arrays(peer)

  def count(function, *arrays):
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return text.count(' dot(')

  once = count(work.once(peer, name), inputs, given, cotangent)
  carry = inputs[0], inputs if name == 'gradient' else ()
  loop = count(work.repeated(peer, name), carry, inputs[1:], given, cotangent)
  assert once > 0
  assert loop == passes * once  # the loop body, with `passes` passes
