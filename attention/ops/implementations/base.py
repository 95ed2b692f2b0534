"""The interface of attention implementations: forward and backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attention.ops.implementations import partitioning
from attention.ops.options import Options
from attention.ops.platforms import by_platform


class Implementation:
  """Attention and its gradient; a frozen dataclass, static under `jit`.

  An implementation is called with checked arguments (query, key, value,
  options) and is differentiable. Its residuals are the arguments, the output
  and two float32 arrays [*b, q, h], whose meaning it chooses: for example the
  largest logit, and the logarithm of the softmax's denominator relative to it.
  """

  def refusal(self, query, key, value, options: Options) -> str | None:
    """Return why the arguments are unsupported, or None; shapes suffice."""
    del query, key, value, options

  def forward(self, query, key, value, options: Options):
    """Return (output [*b, q, h, e], two residuals [*b, q, h] float32)."""
    raise NotImplementedError

  def backward(
    self, query, key, value, options, output, first, second, d_output
  ):
    """Return the gradients of (query, key, value, options).

    Masks and dropout have none (None).
    """
    raise NotImplementedError

  def of_blocks(
    self, query, key, value, options: Options
  ) -> 'Implementation | None':
    """Return an implementation for blocks of the keys, or None; shapes suffice.

    Its residuals are the largest logit, and the natural logarithm of the
    denominator relative to it.
    """
    del query, key, value, options

  def __call__(self, query, key, value, options: Options):
    return _attend(self, query, key, value, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(implementation, query, key, value, options):
  return implementation.forward(query, key, value, options)[0]


def _forward(implementation, *inputs):
  output, *residuals = implementation.forward(*inputs)
  return output, (*inputs, output, *residuals)


def _backward(implementation, saved, d_output):
  return implementation.backward(*saved, d_output)


_attend.defvjp(_forward, _backward)


def gradient_of_options(
  options: Options, bias=None, sinks=None, vector=None
) -> Options:
  """Return a gradient with the structure of `options`.

  Masks and dropout have no gradient (None).
  """
  return dataclasses.replace(
    options, bias=bias, sinks=sinks, vector=vector, mask=None, dropout=None
  )


def no_residuals(query):
  """Return zeros, for implementations that need no residual arrays."""
  zeros = jnp.zeros(query.shape[:-1], jnp.float32)
  return zeros, zeros


class Recomputing(Implementation):
  """An implementation that JAX differentiates, with recomputation."""

  def attend(self, query, key, value, options):
    """Return the output [*b, q, h, e] in the dtype of `query`.

    Fully masked rows return zeros. The key heads divide the query heads, dtypes
    may differ, and axes may be empty unless `refusal` rejects them.
    """
    raise NotImplementedError

  def forward(self, query, key, value, options):
    return self.attend(query, key, value, options), *no_residuals(query)

  def backward(
    self, query, key, value, options, output, first, second, d_output
  ):
    del output, first, second
    floats = options.bias, options.sinks, options.vector

    def function(query, key, value, bias, sinks, vector):
      new = dataclasses.replace(options, bias=bias, sinks=sinks, vector=vector)
      return self.attend(query, key, value, new)

    _, vjp = jax.vjp(function, query, key, value, *floats)
    *grads, bias, sinks, vector = vjp(d_output)
    return *grads, gradient_of_options(options, bias, sinks, vector)


@dataclasses.dataclass(frozen=True)
class Unsupported(Implementation):
  """Placeholder where no implementation is left; raises when lowered."""

  reason: str

  def forward(self, *_):
    raise NotImplementedError(self.reason)

  def backward(self, *_):
    raise NotImplementedError(self.reason)


@dataclasses.dataclass(frozen=True)
class Partitioned(Implementation):
  """An implementation that each device runs on its shard of the inputs."""

  whole: Implementation

  def forward(self, *arguments):
    return partitioning.run(self.whole.forward, False, *arguments)

  def backward(self, *arguments):
    return partitioning.run(self.whole.backward, True, *arguments)


@dataclasses.dataclass(frozen=True)
class OverMesh(Implementation):
  """An implementation that devices of the mesh in context run on their shards.

  Programs say so themselves, so that it holds on every platform, and for axes
  of positions.
  """

  whole: Implementation
  axes: tuple  # pairs (axis of the arguments, mesh axes); see `partitioning`

  def forward(self, *arguments):
    return partitioning.run_over_mesh(
      self.whole.forward, dict(self.axes), False, *arguments
    )

  def backward(self, *arguments):
    return partitioning.run_over_mesh(
      self.whole.backward, dict(self.axes), True, *arguments
    )


@dataclasses.dataclass(frozen=True)
class ByPlatform(Implementation):
  """One implementation for each lowering platform."""

  choices: tuple  # pairs (platform, Implementation)

  def forward(self, query, key, value, options):
    shape = (*query.shape[:-1], value.shape[-1])
    residual = jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)
    shapes = jax.ShapeDtypeStruct(shape, query.dtype), residual, residual
    return by_platform(
      self.choices, 'forward', shapes, query, key, value, options
    )

  def backward(self, query, key, value, options, *others):
    floats = gradient_of_options(
      options, options.bias, options.sinks, options.vector
    )
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      (query, key, value, floats),
    )
    return by_platform(
      self.choices, 'backward', shapes, query, key, value, options, *others
    )
