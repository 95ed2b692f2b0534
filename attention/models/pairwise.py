"""Pairwise models of an alignment: each residue predicted from all others."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attention.modules.fields import check_choice
from attention.ops.attention_weights import attention_weights
from attention.ops.masks import Mask

KINDS = ('factored_attention', 'potts')
NUM_RESIDUES = 20  # kinds of residues; gaps neither predict nor are predicted


@dataclasses.dataclass(kw_only=True, eq=False)
class Pairwise(hk.Module):
  """Logits of each residue, from its couplings to all other residues.

  logits[i, a] = bias[i, a] + Σ_j couplings[j, residue j, i, a]

  'potts' has a free coupling for each pair of positions and of residues
  (Ekeberg et al. 2013). 'factored_attention' is one layer of attention whose
  queries and keys belong to positions and whose values belong to residues
  (Bhattacharya et al. 2021, equation 4):

  pattern[h, i, j] = softmax_j(query[i, h] · key[j, h] / √key_size), j ≠ i
  couplings[j, b, i, a] = Σ_h pattern[h, i, j] value[h, b, a]

  Both are made symmetric, and no residue predicts itself.
  """

  length: int  # positions of the alignment
  kind: str = 'factored_attention'  # 'potts'
  num_heads: int = 64  # of factored attention
  key_size: int = 32  # channels per head, of factored attention
  name: str | None = None

  def __post_init__(self):
    super().__post_init__()
    check_choice('model.kind', self.kind, KINDS)

  def __call__(self, residues):
    """Computes the logits of the residues of each sequence.

    Args:
      residues: [b, length] ids; those from 20 on, such as gaps, are ignored.

    Returns:
      [b, length, 20].
    """
    rows = jax.nn.one_hot(residues, NUM_RESIDUES)
    bias = hk.get_parameter('bias', rows.shape[1:], init=jnp.zeros)
    size = self.length * NUM_RESIDUES
    products = rows.reshape(-1, size) @ self.couplings().reshape(size, size)
    return products.reshape(rows.shape) + bias

  def couplings(self) -> Float[Array, 'l a l a']:
    """Computes the couplings, zero within a position."""
    return self._potts() if self.kind == 'potts' else self._factored()

  def pattern(self) -> Float[Array, 'h l l']:
    """Computes the attention pattern of factored attention."""
    shape = self.length, self.num_heads, self.key_size
    init = hk.initializers.RandomNormal(1.0)
    query = hk.get_parameter('query', shape, init=init)
    key = hk.get_parameter('key', shape, init=init)
    others = Mask.dense(~jnp.eye(self.length, dtype=bool))
    return attention_weights(query, key, mask=others)

  def _factored(self):
    value = hk.get_parameter(
      'value',
      (self.num_heads, NUM_RESIDUES, NUM_RESIDUES),
      init=hk.initializers.RandomNormal(0.01),
    )
    pattern = self.pattern()
    # Transpose these, not the couplings, which are much larger.
    pattern = jnp.concatenate([pattern, pattern.swapaxes(1, 2)])
    value = jnp.concatenate([value, value.swapaxes(1, 2)]) / 2
    return jnp.einsum('hij,hba->jbia', pattern, value)

  def _potts(self):
    shape = (self.length, NUM_RESIDUES) * 2
    couplings = hk.get_parameter('couplings', shape, init=jnp.zeros)
    size = self.length * NUM_RESIDUES
    couplings = couplings.reshape(size, size)
    couplings = ((couplings + couplings.T) / 2).reshape(shape)
    others = 1 - jnp.eye(self.length)
    return couplings * others[:, None, :, None]
