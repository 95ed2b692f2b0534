"""What a call of attention asks for besides query, key and value."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
  """The checked arguments of `dot_product_attention`; a pytree.

  Fields that hold leaves are not annotated with their types: JAX puts objects
  of its own there, which a type checker would refuse.
  """

  bias: object = None  # a description of biases.py
  mask: object = None  # Mask: everything that masks, joined
  sinks: object = None  # [h]
  dropout: object = None  # Dropout
  scale: float = dataclasses.field(metadata={'static': True}, default=1.0)
  logit_cap: float | None = dataclasses.field(
    metadata={'static': True}, default=None
  )
