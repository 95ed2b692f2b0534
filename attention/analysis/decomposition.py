"""The residual stream of a `gpt` as a sum of what its layers add."""

import dataclasses

import jax
import jax.numpy as jnp

from attention.analysis.attribution import FinalNorm
from attention.capture import capture
from attention.ops.attention_weights import select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
  """The terms of a residual stream [b, t, m] after L layers of h heads.

  A pytree of its arrays.
  """

  embedding: jax.Array  # [b, t, m], of tokens and positions
  heads: jax.Array  # [L, h, b, t, m]
  attention_bias: jax.Array  # [L, b, t, m], of the output projections
  feed_forward: jax.Array  # [L, b, t, m]
  stream: jax.Array  # [b, t, m], their sum

  def parts(self) -> tuple[list[str], jax.Array]:
    """Names of all terms, and the terms stacked: [terms, b, t, m]."""
    num_layers, num_heads = self.heads.shape[:2]
    names, parts = ['embedding'], [self.embedding[None]]
    for layer in range(num_layers):
      names += [f'layer {layer} head {head}' for head in range(num_heads)]
      names += [f'layer {layer} bias', f'layer {layer} feed-forward']
      parts += [
        self.heads[layer],
        self.attention_bias[layer][None],
        self.feed_forward[layer][None],
      ]
    return names, jnp.concatenate(parts)


def decompose(function, params, tokens, *, queries=None, rng=None) -> Residual:
  """The terms that sum to the input of a `gpt`'s final norm.

  Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

  Args:
    function: that calls `attention.models.create('gpt', …)` on tokens, an
      argument or result of `hk.transform`; with `norm='pre'`.
    params: the parameters of the function.
    tokens: [b, t].
    queries: positions of the stream to return, in place of all t; under
      `jax.jit`, only they take memory.
    rng: a `jax.random` key, if the function uses random numbers.

  Raises:
    ValueError: blocks that normalise what they add to the stream.
  """
  normalised = [p for p in params if p.endswith('_post_norm')]
  if normalised or not any(p.endswith('/final_norm') for p in params):
    raise ValueError(
      "function: expected blocks with norm='pre', whose outputs add up, got "
      f'{normalised[0] if normalised else "no final_norm"}'
    )
  kinds = 'head_output', 'block_input', 'block_output'
  _, values = capture(function, params, tokens, what=kinds, rng=rng)

  def pick(x):
    x, length = x.astype(jnp.float32), tokens.shape[-1]
    if queries is None:
      return x
    # A product: XLA would keep all positions of x until it indexes the stack.
    chosen = jnp.eye(length)[select('queries', queries, length)]
    return jnp.einsum('bt...,qt->bq...', x, chosen, precision='highest')

  heads, before, after = (
    jnp.stack([pick(x) for x in values[kind].values()]) for kind in kinds
  )
  bias = jnp.stack(
    [
      jnp.broadcast_to(params.get(f'{path}/linear', {}).get('b', 0), x.shape)
      for path, x in zip(values['head_output'], before, strict=True)
    ]
  ).astype(jnp.float32)
  return Residual(
    embedding=before[0],
    heads=jnp.moveaxis(heads, -2, 1),
    attention_bias=bias,
    feed_forward=after - before - heads.sum(-2) - bias,
    stream=after[-1],
  )


def readout(
  params,
  *,
  path: str = 'gpt',
  norm_kind: str = 'layer',
  norm_epsilon: float = 1e-5,
  with_tied_output: bool = True,
) -> tuple[FinalNorm, jax.Array]:
  """The final norm and the unembedding [m, v] of a `gpt`.

  The norm of a model with `norm='post'`, which has none, changes nothing.

  Args:
    params: its parameters.
    path: the name of the model.
    norm_kind: the model's field.
    norm_epsilon: the model's field.
    with_tied_output: the model's field.
  """
  arrays = params.get(f'{path}/final_norm')
  if arrays is None:
    norm = FinalNorm(kind='none', scale=None)
  else:
    norm = FinalNorm(kind=norm_kind, epsilon=norm_epsilon, **arrays)
  if with_tied_output:
    return norm, params[f'{path}/tokens']['embeddings'].T
  return norm, params[f'{path}/output']['w']
