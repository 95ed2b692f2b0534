"""Scores of attention patterns: what heads attend to, and how widely.

Patterns are those of `attention.capture`. All functions support `jax.jit` and
`jax.vmap` and return float32. A mean over no queries is nan.
"""

import functools

import jax.numpy as jnp
from jax.scipy.special import entr


def previous_token(pattern):
  """The mean weight on the token before each query, the first one left out.

  The score of a previous-token head (Elhage et al. 2021, "A Mathematical
  Framework for Transformer Circuits").

  Args:
    pattern: [..., t, t], causal.

  Returns:
    [...] float32 from 0 to 1; nan for one token.

  Raises:
    ValueError: the pattern is not square.
  """
  return jnp.diagonal(_square(pattern), -1, -2, -1).mean(-1)


def first_token(pattern):
  """The mean weight on the first token, of all queries but the first.

  High for heads that use it as an attention sink (Xiao et al. 2024, "Efficient
  Streaming Language Models with Attention Sinks").

  Args:
    pattern: [..., t, t], causal.

  Returns:
    [...] float32 from 0 to 1; nan for one token.

  Raises:
    ValueError: the pattern is not square.
  """
  return _square(pattern)[..., 1:, 0].mean(-1)


def induction(pattern, tokens):
  """The mean weight on tokens that followed the query's token before.

  In … A B … A, the last query attends to B (Olsson et al. 2022, "In-context
  Learning and Induction Heads"). The mean is over queries q whose token
  occurred before; their keys are all k up to q with tokens[k - 1] = tokens[q].

  Args:
    pattern: [*b, h, t, t], causal.
    tokens: [*b, t] ids. Leading axes of the pattern, such as layers, may be
      missing.

  Returns:
    [*b, h] float32 from 0 to 1; nan where no token repeats, so that such rows
    are not mistaken for heads of score 0 (`jnp.nanmean` leaves them out).

  Raises:
    ValueError: the pattern is not square, or the tokens do not match it.
  """
  pattern, earlier = _repeats(pattern, tokens)
  # Nothing wraps around: the last token is earlier than no query.
  return _mean_weight(pattern, jnp.roll(earlier, 1, -1))


def duplicate_token(pattern, tokens):
  """The mean weight on earlier occurrences of the query's token.

  The score of a duplicate-token head (Wang et al. 2023, "Interpretability in
  the Wild"). The mean is over queries q whose token occurred before; their keys
  are all k before q with tokens[k] = tokens[q].

  Args:
    pattern: [*b, h, t, t], causal.
    tokens: [*b, t] ids. Leading axes of the pattern, such as layers, may be
      missing.

  Returns:
    [*b, h] float32 from 0 to 1; nan where no token repeats.

  Raises:
    ValueError: the pattern is not square, or the tokens do not match it.
  """
  return _mean_weight(*_repeats(pattern, tokens))


def entropy(pattern):
  """-Σ p log p over the keys of each query, in nats, where 0 log 0 = 0.

  Args:
    pattern: [..., q, k]. Rows that sum to less than 1, as with sinks, are not
      normalised.

  Returns:
    [..., q] float32; from 0, for one key, to log k, for equal weights, of rows
    that sum to 1.
  """
  return entr(jnp.asarray(pattern, jnp.float32)).sum(-1)


def rollout(patterns, *, residual=0.5):
  """How much of each input reaches each output through attention's layers.

  Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", equation
  1: the product of A = residual · 1 + (1 - residual) · W over the layers, where
  W is the mean over heads and 1 stands for the residual connection.

  Args:
    patterns: [layers, *b, h, t, t], from the first layer to the last.
    residual: the share of the residual connection, 0 to 1, a constant.

  Returns:
    [*b, t, t] float32; rows sum to 1 if those of the patterns do.

  Raises:
    ValueError: the patterns are not square, there is no layer, or the share is
      out of range.
  """
  if not 0 <= residual <= 1:
    raise ValueError(f'residual: expected 0 to 1, got {residual}')
  patterns = _square(patterns, 'layers, *b, h', 4, name='patterns')
  if not len(patterns):
    raise ValueError('patterns: expected one layer or more, got none')
  identity = jnp.eye(patterns.shape[-1], dtype=jnp.float32)
  layers = residual * identity + (1 - residual) * patterns.mean(-3)
  return functools.reduce(
    lambda below, layer: jnp.matmul(layer, below, precision='highest'), layers
  )


def _square(pattern, leading='...', rank=2, *, name='pattern'):
  """The pattern in float32, if it is square and has that rank or more."""
  pattern = jnp.asarray(pattern, jnp.float32)
  shape = pattern.shape
  if len(shape) < rank or shape[-2] != shape[-1]:
    raise ValueError(
      f'{name}: expected [{leading}, q, k] with q = k, got shape {shape}'
    )
  return pattern


def _repeats(pattern, tokens):
  """The pattern, and [*b, 1, q, k]: is k an earlier occurrence of q's token?"""
  pattern, tokens = _square(pattern, '*b, h', 3), jnp.asarray(tokens)
  shape = (*pattern.shape[:-3], pattern.shape[-1])
  if not tokens.ndim or tokens.shape != shape[-tokens.ndim :]:
    raise ValueError(
      f'tokens: expected shape [*b, t] = {shape}, as in pattern, '
      f'got {tokens.shape}'
    )
  same = tokens[..., :, None] == tokens[..., None, :]
  return pattern, jnp.tril(same, -1)[..., None, :, :]


def _mean_weight(pattern, keys):
  """The mean, over queries that have keys, of their total weight on them."""
  return (pattern * keys).sum(-1).mean(-1, where=keys.any(-1))
