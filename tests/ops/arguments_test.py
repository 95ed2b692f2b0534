"""Invalid arguments of attention raise errors that name them."""

import numpy as np
import pytest

import attention
from attention import Mask

B, Q, K, H, G, D, E = 3, 5, 7, 6, 2, 11, 13

_INVALID = {
  'rank': (
    dict(query=(5, 4)),
    {},
    r'query: expected \[\*b, q, h, d\].*\(5, 4\)',
  ),
  'key_rank': (dict(key=(K, G, D)), {}, 'key: expected .* rank of query'),
  'batch': (dict(key=(B + 1, K, G, D)), {}, 'key: expected the leading axes'),
  'heads': (
    dict(key=(B, K, 4, D), value=(B, K, 4, E)),
    {},
    r"key: expected a number of heads that divides query's 6, got 4",
  ),
  'value_heads': (dict(value=(B, K, 1, E)), {}, 'value: expected 2 heads'),
  'channels': (dict(key=(B, K, G, 9)), {}, 'key: expected 11 channels'),
  'lengths': (dict(value=(B, 8, G, E)), {}, 'value: expected 7 positions'),
  'float_mask': (
    {},
    dict(mask=np.zeros((Q, K))),
    'mask: expected a boolean array.*float64.*bias=',
  ),
  'mask_rank': (
    {},
    dict(mask=np.ones((B, Q, K), bool)),
    r'mask: expected \[q, k\] or rank 4.*mask\[..., None, :, :\]',
  ),
  'mask_shape': ({}, dict(mask=np.ones((Q, K + 1), bool)), 'mask: .*broadcast'),
  'bias_rank': (
    {},
    dict(bias=np.ones((Q, K), 'f')),
    r'bias: .*\[h, q, k',
  ),
  'bias_shape': (
    {},
    dict(bias=np.ones((H - 1, Q, K), 'f')),
    r'bias: expected a shape broadcastable.*\(5, 5, 7\)',
  ),
  'bias_bool': (
    {},
    dict(bias=np.ones((H, Q, K), bool)),
    'pass booleans as mask=',
  ),
  'dropout': ({}, dict(dropout_rate=0.1), 'dropout_rng: expected a key'),
  'dropout_rate': (
    {},
    dict(dropout_rate=1.0),
    r'dropout_rate: .*\[0, 1',
  ),
  'sinks': (
    {},
    dict(sinks=np.ones(H + 1, 'f')),
    r'sinks: .*\(6,\).*\(7,\)',
  ),
  'cap': ({}, dict(logit_cap=0.0), 'logit_cap: expected a positive'),
  'no_cap': ({}, dict(logit_cap=np.inf), 'logit_cap: expected a positive, fin'),
  'scale': (
    {},
    dict(scale=np.nan),
    'scale: expected a finite constant, got nan',
  ),
  'rng': (
    {},
    dict(dropout_rate=0.1, dropout_rng=0),
    'dropout_rng: expected a jax.random key, got 0',
  ),
  'no_heads': (
    dict(key=(B, K, 0, D), value=(B, K, 0, E)),
    {},
    "key: expected a number of heads that divides query's 6, got 0",
  ),
  'key_lengths': (
    {},
    dict(mask=Mask.lengths(key_lengths=np.ones(B + 1, int))),
    r'mask: key_lengths: expected a number or an array .*\(3,\).*\(4,\)',
  ),
  'offset': (
    {},
    dict(mask=Mask.causal(np.ones((B, 2), int))),
    r'mask: high: expected .*\(3,\), got shape \(3, 2\)',
  ),
  'segments': (
    {},
    dict(mask=Mask.segments(np.ones((B, Q), int), np.ones((B, K + 1), int))),
    r'mask: key_ids: expected shape \(3, 7\), got \(3, 8\)',
  ),
  'implementation': (
    {},
    dict(implementation='flash'),
    r"implementation: expected one of \[.*'reference'.*\], got 'flash'",
  ),
}


@pytest.mark.parametrize('name', _INVALID)
def test_invalid_arguments_raise(name):
  changed, arguments, message = _INVALID[name]
  shapes = dict(query=(B, Q, H, D), key=(B, K, G, D), value=(B, K, G, E))
  inputs = {n: np.ones(s, 'f') for n, s in (shapes | changed).items()}
  with pytest.raises(ValueError, match=message):
    attention.dot_product_attention(**inputs, **arguments)


@pytest.mark.parametrize('name', ['query', 'key', 'value'])
def test_integers_raise(arrays, name):
  qkv = arrays((B, Q, H, D), (B, K, G, D), (B, K, G, E))
  inputs = dict(zip(('query', 'key', 'value'), qkv, strict=True))
  inputs[name] = inputs[name].astype(int)
  with pytest.raises(ValueError, match=f'{name}: expected float32.*int32'):
    attention.dot_product_attention(**inputs)
