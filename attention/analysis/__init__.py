"""What a model does: scores of patterns, shares of logits, sweeps of edits."""

from attention.analysis.attribution import (
  FinalNorm,
  direct_attribution,
  logit_lens,
)
from attention.analysis.decomposition import Residual, decompose, readout
from attention.analysis.scores import (
  duplicate_token,
  entropy,
  first_token,
  induction,
  previous_token,
  rollout,
)
from attention.analysis.sweeps import sweep

__all__ = [
  'FinalNorm',
  'Residual',
  'decompose',
  'direct_attribution',
  'duplicate_token',
  'entropy',
  'first_token',
  'induction',
  'logit_lens',
  'previous_token',
  'readout',
  'rollout',
  'sweep',
]
