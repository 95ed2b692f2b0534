"""FLOPs of a training step, and the fraction of peak FLOP/s achieved."""

import math

import jax

from attention.ops import few_rows, mapping, platforms
from attention.training.optimization import gradients

# Peak FLOP/s of dense bfloat16 matrix products, from the vendors' data sheets.
_PEAKS = {
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
}


def count_step(task, batch) -> int:
  """Count the model FLOPs of a training step, those of its matrix products.

  The backward pass computes two products for each forward product, so a step
  costs three times its loss. Rematerialisation is not counted (Chowdhery et al.
  2022, "PaLM", appendix B). With frozen parameters, the products that the
  gradients need are counted instead, and rematerialisation with them.
  """
  params = jax.eval_shape(task.init, jax.random.key(0))
  trained, frozen = gradients.partition(task, params)

  def loss(trained, frozen, rng, batch):
    return task.loss(gradients.merge(trained, frozen), rng, batch)

  program = jax.grad(loss, has_aux=True) if frozen else loss
  rng = jax.random.key(0)
  traced = jax.make_jaxpr(program)(trained, frozen, rng, batch)
  return _count(traced.jaxpr) * (1 if frozen else 3)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      total += _of_product(equation)
      continue
    if found := platforms.find(equation):
      total += _of_choice(*found)
      continue
    times = equation.params.get('length', 1)  # of a scan
    inner = jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: _jaxpr(x) is not None
    )
    counts = [_count(_jaxpr(x)) for x in inner if _jaxpr(x) is not None]
    if equation.primitive.name == 'cond':
      counts = [max(counts)]
    total += times * sum(counts)
  return total


def _of_choice(chosen, method, arguments, times):
  """FLOPs of attention, of a loop over rows or of a product, each direction."""
  if isinstance(chosen, mapping.Loop):
    block = _count(chosen.trace(*arguments[:2]))
    forward = block * chosen.count // chosen.size
  elif isinstance(chosen, few_rows.Kernel):
    x, weights = arguments
    return times * 2 * len(x) * weights.size
  else:
    # Query × key and weights × value, ignoring any mask.
    query, key, value, *_ = (x.shape for x in jax.tree.leaves(arguments))
    forward = 2 * math.prod(query[:-1]) * key[-3] * (query[-1] + value[-1])
  return times * forward * (1 if method == 'forward' else 2)


def _jaxpr(x):
  x = getattr(x, 'jaxpr', x)
  return x if hasattr(x, 'eqns') else None


def _of_product(equation):
  left = equation.invars[0].aval.shape
  (contracted, _), _ = equation.params['dimension_numbers']
  shape = equation.outvars[0].aval.shape
  return 2 * math.prod(shape) * math.prod(left[axis] for axis in contracted)


def utilisation(flops_per_second: float, mesh) -> float | None:
  """Return the fraction of the mesh's peak FLOP/s; None if it is unknown."""
  kind = mesh.devices.flat[0].device_kind
  for name, peak in _PEAKS.items():
    if kind.startswith(name):
      return flops_per_second / (peak * mesh.size)
  return None
