"""Rewinding the caches in a tree, and checks that they can be."""

import jax
import jax.numpy as jnp

from attention.ops.cache import Cache, CrossCache


def rewind(cache, count):
  """Forget the last tokens in every `Cache` of a tree; see `Cache.rewind`.

  Args:
    cache: a tree of `Cache` and `CrossCache`.
    count: number of tokens; may be traced.

  Raises:
    ValueError: If there is an array of another kind.
  """
  _nodes('cache', cache)

  def back(node):
    return node.rewind(count) if isinstance(node, Cache) else node

  return jax.tree.map(back, cache, is_leaf=_is_cache)


def check_capacity(name: str, cache, size: int) -> None:
  """Check that the caches that are empty hold `size` tokens."""
  for node in _nodes(name, cache):
    if node.key is None and node.capacity < size:
      raise ValueError(
        f'{name}: expected a capacity of {size}, for the prompt, num_tokens '
        f'and num_draft, got {node.capacity}'
      )


def check_spare(name: str, cache, num_draft: int) -> None:
  """Check that the caches of windows can be rewound by `num_draft` tokens."""
  for node in _nodes(name, cache):
    if node.num_slots < node.capacity and node.spare < num_draft:
      raise ValueError(
        f'{name}: expected spare={num_draft}, num_draft, or more in the '
        f'cache of a window, got {node.spare}'
      )


def _is_cache(node):
  return isinstance(node, Cache | CrossCache)


def _nodes(name, cache):
  """The caches of self-attention in a tree."""
  nodes = jax.tree.leaves(cache, is_leaf=_is_cache)
  for node in nodes:
    if not _is_cache(node):
      raise ValueError(
        f'{name}: expected arrays in a Cache or CrossCache only, got one of '
        f'shape {jnp.shape(node)}'
      )
  return [node for node in nodes if isinstance(node, Cache)]
