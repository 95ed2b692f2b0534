"""AlphaFold's Evoformer with heads for masked residues and for distances."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention.modules.evoformer import EvoformerStack
from attention.modules.layers import bind_linear

NUM_CLASSES = 23  # twenty residues, unknown, gap, mask
NUM_BINS = 64  # of distances
BREAKS = np.linspace(2.3125, 21.6875, NUM_BINS - 1)  # Å, between bins
_NEAR = 8.0  # Å


@dataclasses.dataclass(kw_only=True, eq=False)
class MSA(hk.Module):
  """Logits of an alignment's residues and of the distances between columns.

  The alignment and relative positions are embedded, extra rows change the pairs
  in blocks of their own, and the Evoformer changes both (Jumper et al. 2021,
  Suppl. Alg. 3 to 6, without templates and recycling). The sizes' defaults and
  the names of parameters are AlphaFold's.
  """

  msa_size: int = 256
  pair_size: int = 128
  extra_msa_size: int = 64
  num_blocks: int = 48
  num_extra_blocks: int = 4
  max_relative: int = 32  # positions; those farther apart are treated alike
  evoformer: dict | None = None  # further fields of `EvoformerStack`
  name: str | None = None

  def __call__(self, features, *, is_training: bool = False):
    """Computes the logits of one alignment.

    Args:
      features: those of `make_features`.
      is_training: whether to apply dropout, which uses Haiku's RNG.

    Returns:
      'msa': [s, i, 23], logits of each residue, and 'distances': [i, i, 64],
      symmetric logits of the bins between `BREAKS`; both float32.
    """
    is_column = features['res_mask']
    pair_mask = is_column[:, None] & is_column
    stack = self.evoformer or {}
    msa_act, pair_act = self._embed(features)
    if self.num_extra_blocks:
      extra = features['extra_msa_feat']
      extra_act = bind_linear(
        'extra_msa_activations', self.extra_msa_size, extra
      )(extra)
      _, pair_act = EvoformerStack(
        **stack,
        num_blocks=self.num_extra_blocks,
        is_extra_msa=True,
        name='extra_msa_stack',
      )(
        extra_act,
        pair_act,
        features['extra_mask'],
        pair_mask,
        is_training=is_training,
      )
    msa_act, pair_act = EvoformerStack(
      **stack, num_blocks=self.num_blocks, name='evoformer_iteration'
    )(
      msa_act,
      pair_act,
      features['msa_mask'],
      pair_mask,
      is_training=is_training,
    )
    with hk.name_scope('masked_msa_head'):
      msa = bind_linear('logits', NUM_CLASSES, msa_act, scale=0)(msa_act)
    with hk.name_scope('distogram_head'):
      half = bind_linear('half_logits', NUM_BINS, pair_act, scale=0)(pair_act)
    half = half.astype(jnp.float32)
    return {
      'msa': msa.astype(jnp.float32),
      'distances': half + half.swapaxes(0, 1),
    }

  @hk.transparent
  def _embed(self, features):
    """Activations of the alignment [s, i, a] and of the pairs [i, i, a']."""
    target, rows = features['target_feat'], features['msa_feat']

    def embed(name, size, x):
      return bind_linear(name, size, x)(x)

    msa_act = embed('preprocess_msa', self.msa_size, rows)
    msa_act += embed('preprocess_1d', self.msa_size, target)
    # Tells the query from the other rows.
    first = hk.get_parameter(
      'first_row', (self.msa_size,), msa_act.dtype, jnp.zeros
    )
    msa_act = msa_act.at[0].add(first)

    left = embed('left_single', self.pair_size, target)
    right = embed('right_single', self.pair_size, target)
    positions, most = features['residue_index'], self.max_relative
    offsets = positions[:, None] - positions + most
    relative = jax.nn.one_hot(
      offsets.clip(0, 2 * most), 2 * most + 1, dtype=target.dtype
    )
    # AlphaFold's name, with its letter too many.
    pairs = embed('pair_activiations', self.pair_size, relative)
    return msa_act, left[:, None] + right + pairs


def make_features(sample) -> dict:
  """Encode a sample of `attention.data.masking` for the model.

  Args:
    sample: the arrays of one alignment.

  Returns:
    'target_feat' [i, 22], 'msa_feat' [s, i, 49], 'extra_msa_feat' [e, i, 25]
    (Jumper et al. 2021, Suppl. Table 1), and the masks and 'residue_index' of
    the sample.
  """
  one_hot = jax.nn.one_hot
  # The first entry marks breaks between domains; there are none.
  target = one_hot(sample['query'] + 1, NUM_CLASSES - 1)

  def rows(msa, deletions, *more):
    value = _squash(deletions)
    columns = [deletions.clip(0, 1)[..., None], value[..., None]]
    return jnp.concatenate([one_hot(msa, NUM_CLASSES), *columns, *more], -1)

  mean = _squash(sample['mean_deletions'])[..., None]
  msa = rows(sample['msa'], sample['deletions'], sample['profile'], mean)
  names = 'msa_mask', 'extra_mask', 'res_mask', 'residue_index'
  return {
    'target_feat': target,
    'msa_feat': msa,
    'extra_msa_feat': rows(sample['extra_msa'], sample['extra_deletions']),
    **{name: sample[name] for name in names},
  }


def _squash(deletions):
  return jnp.arctan(deletions / 3) * (2 / jnp.pi)


def contact_probabilities(logits):
  """The probabilities of distances below 8 Å: [i, i, 64] → [i, i]."""
  is_near = np.append(BREAKS, np.inf) <= _NEAR
  return jnp.where(is_near, jax.nn.softmax(logits), 0).sum(-1)
