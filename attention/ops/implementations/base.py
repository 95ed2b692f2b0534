"""What an implementation of attention is: a forward and a backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attention.ops.implementations import partitioning
from attention.ops.options import Options
from attention.ops.platforms import by_platform


class Implementation:
  """Attention and its gradient; a frozen dataclass, static under `jit`.

  Called with checked arguments (query, key, value, call), it is
  differentiable: the residuals are the arguments, the output and two numbers a
  query and head, [*b, q, h] float32, whose meaning is the implementation's own
  (such as the largest logit, and the logarithm of the softmax's denominator
  beyond it).
  """

  def refusal(self, query, key, value, options: Options) -> str | None:
    """Why it cannot compute a call; None if it can. Shapes suffice."""
    del query, key, value, options

  def forward(self, query, key, value, options: Options):
    """(output [*b, q, h, e], two residuals [*b, q, h] float32)."""
    raise NotImplementedError

  def backward(
    self, query, key, value, options, output, first, second, d_output
  ):
    """Gradients of (query, key, value, call); None for masks and dropout."""
    raise NotImplementedError

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
  """A gradient like `call`; masks and dropout have none."""
  return dataclasses.replace(
    options, bias=bias, sinks=sinks, vector=vector, mask=None, dropout=None
  )


def no_residuals(query):
  """For implementations that save nothing but their arguments."""
  zeros = jnp.zeros(query.shape[:-1], jnp.float32)
  return zeros, zeros


class Recomputing(Implementation):
  """A function that JAX differentiates, computed anew in the backward pass."""

  def attend(self, query, key, value, options):
    """The output [*b, q, h, e]."""
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
class Refused(Implementation):
  """Stands where no implementation is left; raises when it is lowered."""

  reason: str

  def forward(self, *_):
    raise NotImplementedError(self.reason)

  def backward(self, *_):
    raise NotImplementedError(self.reason)


@dataclasses.dataclass(frozen=True)
class Cut(Implementation):
  """An implementation, over the devices that XLA cuts a program for."""

  whole: Implementation

  def forward(self, *arguments):
    return partitioning.run(self.whole.forward, False, *arguments)

  def backward(self, *arguments):
    return partitioning.run(self.whole.backward, True, *arguments)


@dataclasses.dataclass(frozen=True)
class ByPlatform(Implementation):
  """One implementation for each platform that a program is lowered for."""

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
