"""A GPT in float64 NumPy that returns every quantity and lets all be edited.

An independent reference, from Radford et al. 2019, of `models.create('gpt')`
with the norm before each layer, layer norms, learned positions, GELU, one
projection for query, key and value, tied output, and no dropout. Tests get
`run` as the fixture `numpy_gpt`.
"""

import numpy as np


def run(params, tokens, *, num_heads, edits=None, epsilon=1e-5):
  """Computes a GPT's logits and all that leads to them.

  Args:
    params: as `hk.transform(…).init` returns them, of a model named 'gpt'.
    tokens: [b, t] ids.
    num_heads: heads, h, which the parameters do not tell.
    edits: {(layer, name): function}, where the name is that of a result. The
      function gets that quantity, and what it returns, of the same shape, takes
      its place in the result and in all that follows. The layer of
      'final_stream' and 'logits' is None.
    epsilon: of the norms.

  Returns:
    A dict of lists, with an array for each layer:
      block_input: [b, t, m].
      query, key, value: [b, t, h, d].
      pattern: [b, h, t, t], the attention weights.
      weighted_value: [b, t, h, d], pattern times value.
      head_output: [b, t, h, m], weighted_value through the head's rows of the
        output projection, without its bias.
      attention_output: [b, t, m], the sum over heads, plus that bias.
      feed_forward_output: [b, t, m].
      block_output: [b, t, m], the sum of block_input and these two.
    And arrays: final_stream [b, t, m], the input of the final norm, and logits
    [b, t, v].

  Raises:
    ValueError: an edit of what does not exist, or one that changes the shape.
  """
  params = {
    module: {name: np.asarray(x, np.float64) for name, x in leaves.items()}
    for module, leaves in params.items()
  }
  tokens = np.asarray(tokens)
  pending = dict(edits or {})
  found = {}

  def at(layer, name, value):
    edit = pending.pop((layer, name), None)
    if edit is not None:
      edited = np.asarray(edit(value.copy()), np.float64)
      if edited.shape != value.shape:
        raise ValueError(
          f'edits: expected shape {value.shape} of {(layer, name)}, '
          f'got {edited.shape}'
        )
      value = edited
    if layer is None:
      found[name] = value
    else:
      found.setdefault(name, []).append(value)
    return value

  embeddings = params['gpt/tokens']['embeddings']
  length = tokens.shape[1]
  is_future = np.arange(length)[None, :] > np.arange(length)[:, None]

  x = embeddings[tokens] + params['gpt']['positions'][:length]
  layer = 0
  while f'gpt/block_{layer}/expand' in params:

    def of(name, block=f'gpt/block_{layer}'):
      return params[f'{block}/{name}']

    x = at(layer, 'block_input', x)

    y = _layer_norm(x, of('attention_norm'), epsilon)
    q, k, v = (
      at(layer, name, part.reshape(*part.shape[:-1], num_heads, -1))
      for name, part in zip(
        ('query', 'key', 'value'),
        np.split(_linear(y, of('attention/qkv')), 3, axis=-1),
        strict=True,
      )
    )
    scores = np.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])
    scores[..., is_future] = -np.inf
    pattern = at(layer, 'pattern', _softmax(scores))
    z = np.einsum('bhqk,bkhd->bqhd', pattern, v)
    z = at(layer, 'weighted_value', z)
    output = of('attention/linear')
    w = output['w'].reshape(num_heads, z.shape[-1], -1)
    heads = at(layer, 'head_output', np.einsum('bthd,hdm->bthm', z, w))
    attended = at(layer, 'attention_output', heads.sum(2) + output['b'])
    middle = x + attended

    y = _layer_norm(middle, of('feed_forward_norm'), epsilon)
    y = _linear(_gelu(_linear(y, of('expand'))), of('contract'))
    y = at(layer, 'feed_forward_output', y)
    x = at(layer, 'block_output', middle + y)
    layer += 1

  x = at(None, 'final_stream', x)
  y = _layer_norm(x, params['gpt/final_norm'], epsilon)
  at(None, 'logits', y @ embeddings.T)
  if pending:
    raise ValueError(f'edits: expected known places, got {list(pending)}')
  return found


def _linear(x, layer):
  return x @ layer['w'] + layer['b']


def _layer_norm(x, layer, epsilon):
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
  return centred / deviation * layer['scale'] + layer['offset']


def _softmax(x):
  powers = np.exp(x - x.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)


def _gelu(x):
  """By tanh (Hendrycks & Gimpel 2016, section 2), as in GPT-2."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
