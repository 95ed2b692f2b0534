"""Gated attention (Jumper et al. 2021, Suppl. Alg. 7 and 19)."""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from attention.ops import products
from attention.ops.attention_weights import attention_weights
from attention.ops.dot_product import dot_product_attention
from attention.ops.masks import Mask

_GLOROT = hk.initializers.VarianceScaling(1.0, 'fan_avg', 'uniform')
_ZEROS, _ONES = hk.initializers.Constant(0.0), hk.initializers.Constant(1.0)


@dataclasses.dataclass(kw_only=True, eq=False)
class GatedAttention(hk.Module):
  """Attention whose output is gated by a function of the query input.

  Parameters, with AlphaFold's names: `query_w` (a, h, c), `key_w` (a, h, c),
  `value_w` (a, h, c), `gating_w` (a, h, c), `gating_b` (h, c), `output_w`
  (h, c, o), `output_b` (o). They are created in the dtype of `q_data`.
  """

  num_head: int
  key_size: int | None = None  # per head; q_data's width / num_head by default
  value_size: int | None = None  # per head; m_data's / num_head by default
  output_size: int | None = None  # output width; q_data's by default
  gating: bool = True
  zero_init: bool = True  # initialise output_w to 0
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def __call__(self, q_data, m_data, mask=None, nonbatched_bias=None):
    """Attend from `q_data` to `m_data`.

    Args:
      q_data: query input [*b, q, a], float32, bfloat16 or float16.
      m_data: key and value input [*b, k, a'].
      mask: boolean [*b, h or 1, q or 1, k], True = may attend, or a `Mask`.
      nonbatched_bias: [h, q, k], added to the logits of every batch row.

    Returns:
      [*b, q, o] in the dtype of `q_data`.

    Raises:
      ValueError: If `num_head` does not divide a width, the mask is not boolean
        or has the wrong rank, or the shapes are incompatible.
    """
    weights = self.weights(q_data, m_data)
    return self.gated(weights, q_data, m_data, mask, nonbatched_bias)

  def weights(self, q_data, m_data) -> dict:
    """Create or fetch all parameters, by name."""
    a, h, c, v, o = _resolve_sizes(self, q_data, m_data)
    m = m_data.shape[-1]
    return _parameters(
      q_data.dtype,
      query_w=((a, h, c), _GLOROT),
      key_w=((m, h, c), _GLOROT),
      value_w=((m, h, v), _GLOROT),
      **_gate_and_output_specs(self, a, h, v, o),
    )

  def gated(self, weights: dict, q_data, m_data, mask=None, bias=None):
    """Apply gated attention as a pure function of parameters and inputs."""
    if mask is not None and not isinstance(mask, Mask):
      mask = _check_mask(
        'mask', mask, q_data.ndim + 1, '[*b, h or 1, q or 1, k]'
      )
    query = _project(q_data, weights['query_w'])
    key = _project(m_data, weights['key_w'])
    value = _project(m_data, weights['value_w'])
    values = self.attend(query, key, value, mask=mask, bias=bias)
    if self.gating:
      values *= self.gate(weights, q_data)
    return self.project(weights, values)

  def gate(self, weights: dict, q_data):
    """Compute what scales the values of each head: [*b, q, h, c]."""
    gate = _project(q_data, weights['gating_w'])
    return jax.nn.sigmoid(gate + weights['gating_b'])

  def project(self, weights: dict, values):
    """Sum the outputs of all heads: [*b, q, h, c] → [*b, q, o]."""
    flat = values.reshape(math.prod(values.shape[:-3]), *values.shape[-3:])
    output = products.dot(flat, weights['output_w'], 2)
    output += weights['output_b']
    return output.reshape(*values.shape[:-2], output.shape[-1])

  def attend(self, query, key, value, *, mask, bias):
    """Compute softmax(query keyᵀ / √c + bias) value.

    All attention calls go through this method, so that `hk.intercept_methods`
    can intercept them. Shapes: [*b, q, h, c] → [*b, q, h, c'].
    """
    return dot_product_attention(
      query,
      key,
      value,
      mask=mask,
      bias=bias,
      implementation=self.implementation,
    )

  def pattern(self, query, key, *, mask, bias, heads=None, queries=None):
    """Compute the weights of `attend`, [*b, heads, queries, k]."""
    return attention_weights(
      query, key, mask=mask, bias=bias, heads=heads, queries=queries
    )


@dataclasses.dataclass(kw_only=True, eq=False)
class GlobalAttention(hk.Module):
  """Gated attention with one query per head, the mean over all positions.

  Its cost is linear in the number of positions. Parameters are those of
  `GatedAttention`, except that all heads share keys and values: `key_w` (a, c),
  `value_w` (a, c).
  """

  num_head: int
  key_size: int | None = None  # per head; q_data's width / num_head by default
  value_size: int | None = None  # m_data's width / num_head by default
  output_size: int | None = None  # output width; q_data's by default
  gating: bool = True
  zero_init: bool = True  # initialise output_w to 0
  implementation: str | None = None  # see dot_product_attention
  name: str | None = None

  def __call__(self, q_data, m_data, q_mask=None):
    """Attend from the mean of `q_data` to `m_data`.

    Args:
      q_data: query input [*b, q, a], float32, bfloat16 or float16.
      m_data: key and value input [*b, q, a'].
      q_mask: boolean [*b, q, 1], False where a position is excluded from the
        mean and from the keys.

    Returns:
      [*b, q, o] in the dtype of `q_data`, or [*b, 1, o] without gating.

    Raises:
      ValueError: If `num_head` does not divide a width, the mask is not boolean
        or has the wrong rank, or the shapes are incompatible.
    """
    return self.gated(self.weights(q_data, m_data), q_data, m_data, q_mask)

  def weights(self, q_data, m_data) -> dict:
    """Create or fetch all parameters, by name."""
    a, h, c, v, o = _resolve_sizes(self, q_data, m_data)
    m = m_data.shape[-1]
    return _parameters(
      q_data.dtype,
      query_w=((a, h, c), _GLOROT),
      key_w=((m, c), _GLOROT),
      value_w=((m, v), _GLOROT),
      **_gate_and_output_specs(self, a, h, v, o),
    )

  def gated(self, weights: dict, q_data, m_data, q_mask=None):
    """Apply gated attention as a pure function of parameters and inputs."""
    if q_mask is None:
      q_mask = jnp.ones((*q_data.shape[:-1], 1), bool)
    q_mask = _check_mask('q_mask', q_mask, q_data.ndim, '[*b, q, 1]')
    mean = _masked_mean(q_data, q_mask)
    query = products.dot(mean, weights['query_w'])
    key = products.dot(m_data, weights['key_w'])
    value = products.dot(m_data, weights['value_w'])
    values = self.attend(
      query[..., None, :, :],
      key[..., None, :],
      value[..., None, :],
      mask=jnp.swapaxes(q_mask, -1, -2)[..., None, :, :],
      bias=None,
    )
    if self.gating:
      values = values * self.gate(weights, q_data)
    return self.project(weights, values)

  attend = GatedAttention.attend
  pattern = GatedAttention.pattern
  gate = GatedAttention.gate
  project = GatedAttention.project


def _project(x, weights):
  """[*b, t, a] → [*b, t, h, c], with the leading axes flattened to one."""
  flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
  heads = products.dot(flat, weights)
  return heads.reshape(*x.shape[:-1], *heads.shape[2:])


def _masked_mean(x, mask):
  """The mean over unmasked positions: [*b, q, a] → [*b, a]."""
  mask = mask.astype(jnp.float32)
  total = (x.astype(jnp.float32) * mask).sum(-2)
  return (total / jnp.maximum(mask.sum(-2), 1)).astype(x.dtype)


def _resolve_sizes(module, q_data, m_data):
  """Sizes (a, h, key channels, value channels, o)."""
  batch, got = q_data.shape[:-2], m_data.shape[:-2]
  if got != batch:
    raise ValueError(
      f'm_data: expected the leading axes of q_data, {batch}, got {got}'
    )
  widths = (q_data.shape[-1], m_data.shape[-1])
  given = (module.key_size, module.value_size)
  sizes = []
  for name, width, size in zip(
    ('key_size', 'value_size'), widths, given, strict=True
  ):
    if size is None and width % module.num_head:
      raise ValueError(
        f'num_head: expected a divisor of the width {width}, got '
        f'{module.num_head}; change either, or set {name}'
      )
    sizes.append(width // module.num_head if size is None else size)
  return (
    widths[0],
    module.num_head,
    *sizes,
    widths[0] if module.output_size is None else module.output_size,
  )


def _gate_and_output_specs(module, a, h, c, o):
  gate = {'gating_w': ((a, h, c), _ZEROS), 'gating_b': ((h, c), _ONES)}
  return (gate if module.gating else {}) | {
    'output_w': ((h, c, o), _ZEROS if module.zero_init else _GLOROT),
    'output_b': ((o,), _ZEROS),
  }


def _parameters(dtype, **specs):
  return {
    name: hk.get_parameter(name, shape, dtype, init).astype(dtype)
    for name, (shape, init) in specs.items()
  }


def _check_mask(name, mask, rank, shape):
  """Validate the mask and return it as an array."""
  mask = jnp.asarray(mask)
  if mask.dtype != bool:
    raise ValueError(
      f'{name}: expected booleans (True = may attend), got {mask.dtype}; '
      f'compare: {name} != 0'
    )
  if mask.ndim != rank:
    raise ValueError(
      f'{name}: expected {shape} of rank {rank}, got shape {mask.shape}'
    )
  return mask
