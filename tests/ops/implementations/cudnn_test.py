"""cuDNN attention: what it refuses, and its masks by JAX's XLA path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention
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


@pytest.mark.parametrize(
  ('arguments', 'reason'),
  [
    (dict(bias=jnp.zeros((H, T, T))), 'bias is not supported'),
    (dict(logit_cap=3.0), 'logit_cap is not supported'),
    (dict(mask=Mask.causal(1)), 'only causal bands'),
    (dict(mask=Mask.prefix(2)), 'Mask.prefix is not supported'),
    (dict(mask=Mask.window(2) & Mask.lengths(None, 3)), 'only causal bands'),
    (dict(mask=Mask.window(2, 0) & Mask.lengths(None, 3)), 'chosen'),
    (dict(is_causal=True), 'chosen'),
  ],
)
def test_cudnn_reports_unsupported_arguments(arguments, reason):
  q = jax.ShapeDtypeStruct((B, T, H, D), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((B, T, G, D), jnp.bfloat16)
  ((_, reported),) = attention.explain(
    q, k, k, platform='cuda', implementation='cudnn', **arguments
  )
  assert reason in reported


def test_cudnn_reports_unsupported_dtype_and_platform(arrays):
  qkv = arrays((B, T, H, D), (B, T, G, D), (B, T, G, D))
  for platform, reason in (('cuda', 'expected bfloat16'), ('cpu', 'no kernel')):
    ((_, reported),) = attention.explain(
      *qkv, platform=platform, implementation='cudnn'
    )
    assert reason in reported
