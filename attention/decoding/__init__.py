"""Autoregressive decoding with any model.

A model is a function `step(tokens, cache) -> (logits, cache)`. It takes the
next tokens [b, t] and returns the logits [b, v] of the token that follows. The
cache is any tree of scalars and of arrays with a leading batch axis. The step
on the prompt may change the structure of the cache; later steps must not.

`greedy`, `sample`, `beam_search` and `speculative` are a single loop each that
can be jitted. It stops when every row has ended. Ended rows are padded with the
end token, the first if there are several.
"""

from attention.decoding.beams import beam_search
from attention.decoding.filters import check_strategy
from attention.decoding.prompts import prefill
from attention.decoding.rewinding import rewind
from attention.decoding.sampling import greedy, sample
from attention.decoding.speculation import speculative

__all__ = [
  'beam_search',
  'check_strategy',
  'greedy',
  'prefill',
  'rewind',
  'sample',
  'speculative',
]
