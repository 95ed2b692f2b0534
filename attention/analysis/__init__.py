"""What trained models do: scores of attention patterns, shares of logits."""

from attention.analysis.attribution import (
  FinalNorm,
  direct_attribution,
  logit_lens,
)
from attention.analysis.scores import (
  duplicate_token,
  entropy,
  first_token,
  induction,
  previous_token,
  rollout,
)

__all__ = [
  'FinalNorm',
  'direct_attribution',
  'duplicate_token',
  'entropy',
  'first_token',
  'induction',
  'logit_lens',
  'previous_token',
  'rollout',
]
