"""A mixture of expert feed-forward layers (Shazeer et al. 2017)."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp

from attention.modules.fields import check_count
from attention.modules.layers import Linear


@dataclasses.dataclass(kw_only=True, eq=False)
class Experts(hk.Module):
  """Feed-forward layers of which each token passes through the likeliest few.

  A router scores the experts; the softmax over the scores of the `num_active`
  highest weights their outputs. An expert is the gated layer of gpt-oss,
  `contract(gate(x) · sigmoid(alpha · gate(x)) · (expand(x) + 1))`, with gate(x)
  clipped to at most `limit`, and expand(x) to [-limit, limit].

  The parameters are `router/{w,b}` (m, n), `gate_w` and `expand_w` (n, m, f),
  `contract_w` (n, f, m), and biases `gate_b`, `expand_b` (n, f) and
  `contract_b` (n, m). No loss balances the load of the experts.
  """

  num_experts: int  # n
  num_active: int  # experts per token
  hidden_size: int  # f, of each expert
  alpha: float = 1.702
  limit: float = 7.0
  w_init: hk.initializers.Initializer | None = None
  output_w_init: hk.initializers.Initializer | None = None  # default: w_init
  name: str | None = None

  def __call__(self, x):
    """Maps [*b, m] to [*b, m].

    Raises:
      ValueError: a size below 1, or more active experts than there are.
    """
    self._check()
    flat = x.reshape(-1, x.shape[-1])
    router = Linear(self.num_experts, w_init=self.w_init, name='router')
    scores, chosen = jax.lax.top_k(router(flat), self.num_active)  # [t, k]
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    # Tokens sorted by expert, so that each expert's product is one block.
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    expert = chosen.reshape(-1)[order]
    token = order // self.num_active
    sizes = jnp.bincount(expert, length=self.num_experts)
    outputs = self._apply(flat[token], expert, sizes.astype(jnp.int32))
    weighted = outputs * weights.reshape(-1)[order][:, None]
    summed = jnp.zeros(flat.shape, jnp.float32).at[token].add(weighted)
    return summed.astype(x.dtype).reshape(x.shape)

  @hk.transparent
  def _apply(self, x, expert, sizes):
    """Rows [r, m] through their experts [r], sorted, to float32 [r, m]."""
    width = x.shape[-1]

    def project(x, name, size, init):
      init = init or hk.initializers.VarianceScaling(
        1.0, 'fan_in', 'truncated_normal', fan_in_axes=(1,)
      )
      shape = (self.num_experts, x.shape[-1], size)
      weights = hk.get_parameter(f'{name}_w', shape, x.dtype, init)
      bias = hk.get_parameter(
        f'{name}_b', (self.num_experts, size), x.dtype, jnp.zeros
      )
      return jax.lax.ragged_dot(x, weights, sizes) + bias[expert]

    gate = project(x, 'gate', self.hidden_size, self.w_init)
    gate = jnp.minimum(gate, self.limit)
    up = project(x, 'expand', self.hidden_size, self.w_init)
    up = jnp.clip(up, -self.limit, self.limit)
    hidden = gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)
    init = self.output_w_init or self.w_init
    return project(hidden, 'contract', width, init).astype(jnp.float32)

  def _check(self):
    for field in ('num_experts', 'num_active', 'hidden_size'):
      check_count(f'experts.{field}', getattr(self, field))
    if self.num_active > self.num_experts:
      raise ValueError(
        f'experts.num_active: expected at most num_experts={self.num_experts}, '
        f'got {self.num_active}'
      )
