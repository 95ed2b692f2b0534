"""cuDNN's masks and fully masked rows, computed by JAX's XLA path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import Mask
from attention.ops.arguments import check
from attention.ops.implementations import reference
from attention.ops.implementations.cudnn import Cudnn

B, T, H, G, D = 3, 8, 6, 2, 16
_MASKS = {
  'none': None,
  'causal': Mask.causal(),
  'window': Mask.window(2, 0),
  'lengths': Mask.lengths(np.array([1, 5, T]), np.array([0, 3, T])),
  'both': Mask.lengths(None, np.array([0, 3, T])) & Mask.causal(),
}


@pytest.mark.parametrize('mask', _MASKS)
def test_values_and_gradients_are_the_references(
  mask, arrays, assert_close, monkeypatch
):
  attend = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda *a, implementation, **k: attend(*a, implementation='xla', **k),
  )
  qkv = arrays((B, T, H, D), (B, T, G, D), (B, T, G, D), dtype=jnp.bfloat16)
  *qkv, options = check(*qkv, mask=_MASKS[mask])
  assert Cudnn().refusal(*qkv, options) is None

  def run(attend):
    def loss(*qkv):
      output = attend(*qkv, options)
      return (output.astype(jnp.float32) ** 2).sum(), output

    gradients = jax.grad(loss, (0, 1, 2), has_aux=True)
    return jax.jit(gradients)(*qkv)

  actual, expected = run(Cudnn().attend), run(reference.attention)
  jax.tree.map(assert_close, actual, expected)
