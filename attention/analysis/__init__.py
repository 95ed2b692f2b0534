"""What trained models do: scores of attention patterns."""

from attention.analysis.scores import (
  duplicate_token,
  entropy,
  first_token,
  induction,
  previous_token,
  rollout,
)

__all__ = [
  'duplicate_token',
  'entropy',
  'first_token',
  'induction',
  'previous_token',
  'rollout',
]
