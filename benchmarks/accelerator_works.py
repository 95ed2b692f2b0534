"""Workloads of accelerators.py, and the peers that compute them."""

import dataclasses
import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

import attention
from attention import Mask
from attention.modules.evoformer import EvoformerBlock
from attention.training import command_line, tasks
from attention.training.optimization import optimizers, precision, step

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# Query shapes [b, t, h, d]. 'pair' has a bias [h, t, t] shared by all batch
# rows, and key lengths; the others are causal.
ATTENTION = {
  'pair256': (256, 256, 4, 32),
  'pair384': (384, 384, 4, 32),
  'pair512': (512, 512, 4, 32),
  'causal4096': (1, 4096, 4, 64),
  'gpt2_layer': (8, 1024, 12, 64),
}
NAMES = (*ATTENTION, 'evoformer', 'gpt2_step')
_WIDTHS = 256, 128  # AlphaFold's MSA and pair channels


@dataclasses.dataclass(frozen=True)
class Peer:
  """One way to compute a workload."""

  function: Callable  # (*inputs, *given) -> output, shaped like inputs[0]
  arrange: Callable = lambda tree: tree  # converts inputs or their gradients


@dataclasses.dataclass(frozen=True)
class Work:
  """A workload: the arrays, and the peers that compute with them."""

  draw: Callable  # () -> (inputs to differentiate, other arguments)
  peers: dict  # Peers by name, ours first
  passes: tuple = ('forward', 'gradient')
  exact: Peer | None = None  # the reference for errors, run in float32
  repeats: int = 20  # repetitions per program; an even number

  def arrays(self, peer: Peer):
    """Return (inputs, given, output's cotangent) in the peer's layout."""
    inputs, given = self.draw()
    inputs, cotangent = peer.arrange(inputs), None
    if 'gradient' in self.passes:
      cotangent = jax.tree.map(lambda x: x[..., ::-1], inputs[0])
    return inputs, given, cotangent

  def once(self, peer: Peer, name: str):
    """Make (inputs, given, cotangent) -> (output, gradients of the inputs)."""

    def forward(inputs, given, cotangent):
      return peer.function(*inputs, *given), ()

    def gradient(inputs, given, cotangent):
      output, vjp = jax.vjp(lambda *x: peer.function(*x, *given), *inputs)
      return output, vjp(cotangent)

    return gradient if name == 'gradient' else forward

  def program(self, peer: Peer, name: str):
    """Make a single pass: (inputs, given, cotangent) -> results."""
    once = self.once(peer, name)

    def run(*arrays):
      output, gradients = once(*arrays)
      return gradients if name == 'gradient' else (output,)

    return run

  def repeated(self, peer: Peer, name: str):
    """Make a loop of `repeats` passes; each output is the next first input.

    XLA can neither drop a pass nor hoist work out of the loop. Unrolling two
    forward passes per iteration saves a copy, because the result ends up in the
    input's buffer. Gradient passes are not unrolled: the first of two gradients
    would be unused, so XLA would not compute it.
    """
    once = self.once(peer, name)

    def run(carry, others, given, cotangent):
      def body(_, carry):
        # Make the arrays opaque, or loop-invariant work would be hoisted.
        arrays = (carry[0], *others), given, cotangent
        return once(*jax.lax.optimization_barrier(arrays))

      unroll = 1 if name == 'gradient' else 2
      return jax.lax.fori_loop(0, self.repeats, body, carry, unroll=unroll)

    return run


def create(name: str, scale: int = 1) -> Work:
  """Create a workload by name, with its lengths divided by `scale`."""
  if name in ATTENTION:
    batch, length, *sizes = ATTENTION[name]
    is_pair = name.startswith('pair')
    batch = max(1, batch // scale) if is_pair else batch
    return _attention((batch, length // scale, *sizes), is_pair)
  return {'evoformer': _evoformer, 'gpt2_step': _gpt2_step}[name](scale)


def _normal(key, shape):
  return jax.random.normal(key, shape, jnp.bfloat16)


def _attention(shape, is_pair):
  batch, length, heads, _ = shape

  def draw():
    keys = jax.random.split(jax.random.key(0), 5)
    qkv = [_normal(key, shape) for key in keys[:3]]
    if not is_pair:
      return (*qkv, None), (None,)
    bias = _normal(keys[3], (heads, length, length))
    lengths = jax.random.randint(keys[4], batch, length // 2, length + 1)
    return (*qkv, bias), (lengths,)

  peers = {
    'default': Peer(_ours(None)),
    'chunked': Peer(_ours('chunked')),
    'reference': Peer(_ours('reference')),
    'cudnn': Peer(_ours('cudnn')),
    'jax.nn xla': Peer(_jax_nn('xla')),
    'jax.nn cudnn': Peer(_jax_nn('cudnn')),
  }
  if importlib.util.find_spec('tokamax'):
    peers['tokamax'] = Peer(_tokamax)
  if importlib.util.find_spec('cuequivariance_jax') and is_pair:
    peers['cuequivariance'] = Peer(_cuequivariance, _heads_first)
  return Work(draw, peers, exact=peers['reference'])


def _ours(implementation):
  def function(query, key, value, bias, lengths):
    is_causal = lengths is None
    mask = Mask.causal() if is_causal else Mask.lengths(key_lengths=lengths)
    return attention.dot_product_attention(
      query, key, value, bias=bias, mask=mask, implementation=implementation
    )

  return function


def _jax_nn(implementation):
  return functools.partial(
    _like_jax_nn, jax.nn.dot_product_attention, implementation
  )


def _tokamax(*arrays):
  import tokamax

  return _like_jax_nn(tokamax.dot_product_attention, None, *arrays)


def _like_jax_nn(function, implementation, query, key, value, bias, lengths):
  return function(
    query,
    key,
    value,
    bias=None if bias is None else bias[None],
    is_causal=lengths is None,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )


def _cuequivariance(query, key, value, bias, lengths):
  import cuequivariance_jax

  size, num_key = query.shape[-1], key.shape[-2]
  mask = (jnp.arange(num_key) < lengths[:, None])[None, :, None, None]
  output, *_ = cuequivariance_jax.triangle_attention(
    query, key, value, bias, mask, size**-0.5
  )
  return output


def _heads_first(arrays):
  """Rearrange arrays as cuequivariance expects them.

  [b, t, h, d] becomes [1, b, h, t, d], and a bias [h, q, k] becomes
  [1, 1, h, q, k] in float32.
  """

  def arrange(x):
    if x.ndim == 3:
      return x[None, None].astype(jnp.float32)
    return x.swapaxes(1, 2)[None]

  return jax.tree.map(arrange, arrays)


def _block_peers(make):
  """Create a model's peers, one per implementation of attention."""
  chosen = (None, 'chunked', 'reference')
  return {name or 'default': Peer(make(name)) for name in chosen}


def _evoformer(scale):
  num_seq = num_res = 256 // scale
  shapes = (num_seq, num_res, _WIDTHS[0]), (num_res, num_res, _WIDTHS[1])

  def model(implementation):
    return hk.without_apply_rng(
      hk.transform(
        lambda *x: EvoformerBlock(
          zero_init=False, implementation=implementation
        )(*x)
      )
    )

  def draw():
    keys = jax.random.split(jax.random.key(0), 5)
    act = tuple(
      0.1 * _normal(key, shape)
      for key, shape in zip(keys, shapes, strict=False)
    )
    masks = tuple(
      jax.random.bernoulli(key, 0.9, shape[:2])
      for key, shape in zip(keys[2:], shapes, strict=False)
    )
    params = model(None).init(keys[4], *act, *masks)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return (act, params), (masks,)

  def make(implementation):
    apply = model(implementation).apply
    return lambda act, params, masks: apply(params, *act, *masks)

  peers = _block_peers(make)
  return Work(draw, peers, exact=peers['reference'], repeats=4)


def _gpt2_step(scale):
  """A GPT-2 training step, which maps the training state to the next one."""
  size = 'gpt2' if scale == 1 else 'debug'

  def load(implementation):
    config = command_line.load_config(
      str(_ROOT / f'configs/gpt_char.py:{size}')
    )
    # Bytes need no vocabulary to be learnt; the model keeps its vocab_size.
    config.data.level = 'bytes'
    if implementation:
      config.model.implementation = implementation
    optimizer = optimizers.adamw(
      steps=config.training.steps, **config.optimizer
    )
    return config, tasks.create(config), optimizer

  def draw():
    config, task, (optimizer, _) = load(None)
    state = step.init(task, optimizer, config.seed, config.training.precision)
    return (state,), (jax.tree.map(jnp.asarray, task.batch(0)),)

  def make(implementation):
    config, task, optimizer = load(implementation)
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ('data', 'fsdp', 'tensor'))
    parts = config.training.num_microbatches
    train_step = step.make(task, *optimizer, config.seed, mesh, parts)

    def run(state, batch):
      with precision.applied(config.training.precision):
        return train_step(state, batch, np.int32(0))[0]

    return run

  return Work(draw, _block_peers(make), passes=('step',), repeats=2)


def to_float32(arrays):
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, arrays
  )


def bytes_outside(shapes, name: str) -> int:
  """Return the bytes of inputs and output, and of the cotangent if used."""
  inputs, given, cotangent = shapes
  outside = [inputs, given, inputs[0]]
  if name == 'gradient':
    outside.append(cotangent)
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(outside)
  )


def error(got: tuple, expected: tuple) -> float:
  """Return the largest relative error of the results.

  The error of a result is its largest difference, divided by the largest entry
  of the expected result.
  """

  def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))

  errors = []
  for x, y in zip(to_float32(got), expected, strict=True):
    if y is not None:
      errors.append(largest(jax.tree.map(jnp.subtract, x, y)) / largest(y))
  return max(errors)
