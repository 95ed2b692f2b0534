"""What the heads and the layers of a GPT do with a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention import analysis
from attention.capture import capture
from attention.modules import lora

# Of a head: means over the queries.
SCORES = (
  'induction',
  'duplicate token',
  'previous token',
  'first token',
  'entropy (nats)',
  'output norm',
)
_NUM_GUESSES = 5  # of the logit lens, by layer and position
_READOUT = ('norm_kind', 'norm_epsilon', 'with_tied_output')


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """What a GPT of L layers of h heads does with a text of t tokens."""

  tokens: list[str]  # the text of each
  patterns: np.ndarray  # [L, h, t, t]
  norms: np.ndarray  # [L, h, t], of the heads' outputs
  scores: np.ndarray  # [scores, L, h], named by `SCORES`
  # Logit lens: by layer and position, the likeliest next tokens, the likeliest
  # first, and their probabilities.
  guesses: list[list[list[tuple[str, float]]]]
  parts: dict[str, float]  # shares of the likeliest next token's logit, or {}

  @classmethod
  def of(cls, measured: dict, pieces, tokens) -> 'Study':
    """The study of tokens [1, t].

    Args:
      measured: a result of `measure`.
      pieces: returns the text of each token of a list.
      tokens: those that were measured.
    """
    probabilities, guesses = map(np.asarray, measured['guesses'])
    names = pieces(guesses.ravel())
    pairs = iter(zip(names, probabilities.ravel().tolist(), strict=True))
    layers, length, count = guesses.shape
    return cls(
      tokens=pieces(tokens[0]),
      patterns=np.stack(measured['patterns']),
      norms=np.stack(measured['norms']),
      scores=np.asarray(measured['scores']),
      guesses=[
        [[next(pairs) for _ in range(count)] for _ in range(length)]
        for _ in range(layers)
      ],
      parts=_parts(*measured['sum']) if measured['sum'] else {},
    )


def measure(model, fields: dict, vocab_size: int, params, tokens) -> dict:
  """Run a GPT on tokens [1, t]; for `jax.jit`, which drops what is reduced.

  Args:
    model: a result of `hk.transform`.
    fields: of the model.
    vocab_size: the number of tokens; the model may have more logits.
    params: the model's parameters.
    tokens: [1, t].

  Returns:
    Arrays for `Study.of`.
  """
  kinds = 'pattern', 'head_output', 'block_output'
  _, found = capture(model, params, tokens, what=kinds)
  patterns, streams = (
    [x[0] for x in found[kind].values()] for kind in ('pattern', 'block_output')
  )
  norms = [_norms(x[0]) for x in found['head_output'].values()]
  scores = [
    _scores(*layer, tokens[0]) for layer in zip(patterns, norms, strict=True)
  ]
  norm, unembedding = _readout(fields, params)
  unembedding = unembedding[:, :vocab_size]

  def guess(stream):
    logits = analysis.logit_lens(stream, unembedding, norm=norm)
    if cap := fields.get('output_logit_cap'):
      logits = cap * jnp.tanh(logits / cap)
    return lax.top_k(jax.nn.softmax(logits), min(_NUM_GUESSES, vocab_size))

  probabilities, guesses = lax.map(guess, jnp.stack(streams))  # [L, t, guesses]
  terms = ()
  if not why_no_sum(fields):
    residual = analysis.decompose(model, params, tokens, queries=-1)
    terms = residual, norm, unembedding[:, guesses[-1, -1, 0]]
  return {
    'patterns': patterns,
    'norms': norms,
    'scores': jnp.stack(scores, axis=1),
    'guesses': (probabilities, guesses),
    'sum': terms,
  }


def repeated_tokens(task, count: int, seed: int) -> np.ndarray:
  """Draw random tokens, and repeat them once: a probe of induction.

  Nothing but the repetition predicts them (Olsson et al. 2022). They are
  distinct if the vocabulary suffices.

  Args:
    task: the language task whose vocabulary and context are used.
    count: number of tokens to draw.
    seed: random seed.

  Returns:
    [1, t], the prefix and both copies.

  Raises:
    ValueError: they do not fit into the model's context.
  """
  most = (task.context_size - len(task.prefix)) // 2
  if not 1 <= count <= most:
    raise ValueError(
      f'random_tokens: expected 1 to {most}, as they must fit into the '
      f'context of {task.context_size} tokens twice, got {count}'
    )
  size = task.vocabulary.size
  rng = np.random.default_rng(seed)
  drawn = rng.choice(size, count, replace=count > size)
  return np.array([[*task.prefix, *drawn, *drawn]], np.int32)


def why_no_sum(fields: dict) -> str:
  """Why logits of a GPT are no sum over its parts, or ''."""
  if (norm := fields.get('norm', 'pre')) != 'pre':
    return f'norm={norm!r} normalises what layers add'
  if cap := fields.get('output_logit_cap'):
    return f'output_logit_cap={cap} is not linear'
  return ''


def _norms(shares):
  """[t, h, m] → [h, t]."""
  return jnp.linalg.norm(shares.astype(jnp.float32), axis=-1).T


def _scores(pattern, norms, tokens):
  """[h, t, t], [h, t], [t] → [scores, h], in the order of `SCORES`."""
  return jnp.stack(
    [
      analysis.induction(pattern, tokens),
      analysis.duplicate_token(pattern, tokens),
      analysis.previous_token(pattern),
      analysis.first_token(pattern),
      analysis.entropy(pattern).mean(-1),
      norms.mean(-1),
    ]
  )


def _readout(fields, params):
  """The final norm and the unembedding, with its low-rank update if any."""
  updates = fields.get('lora') or {}
  if updates.get('rank'):
    params = lora.merge(params, alpha=updates['alpha'])
  given = {name: fields[name] for name in _READOUT if name in fields}
  return analysis.readout(params, **given)


def _parts(residual, norm, direction):
  """What each part of the last stream adds to a logit, by name."""
  names, parts = residual.parts()
  shares = analysis.direct_attribution(
    parts, residual.stream, direction, norm=norm
  )
  named = dict(zip(names, shares.ravel().tolist(), strict=True))
  if norm.offset is not None:
    named['final norm offset'] = float(direction @ norm.offset)
  return named
