"""Block sizes, warps and pipeline stages of the GPU kernels."""

import dataclasses
import math

from attention.ops.implementations.fused.operands import PerRow, Shape

_SHARED_MEMORY = 96 * 2**10  # bytes; the smallest GPUs have 99 KiB
# (queries, keys, warps, stages) by kernel and by the largest number of bytes
# per position and head. On an H200, in bfloat16, the entries for 64 bytes (pair
# bias), 128 and 256 (causal) are within 7% of the fastest of those tried. The
# bias's from 128 on, and all from 512 on, have not been timed.
_LAUNCHES = {
  'forward': {
    64: (128, 32, 4, 4),
    128: (64, 64, 4, 3),
    256: (64, 64, 4, 2),
    512: (64, 32, 4, 2),
    1024: (32, 32, 8, 1),
  },
  'query': {
    64: (64, 32, 4, 2),
    128: (64, 32, 4, 3),
    256: (64, 64, 4, 2),
    512: (32, 32, 4, 2),
    1024: (16, 32, 8, 1),
  },
  'key': {
    64: (64, 64, 4, 1),
    128: (64, 64, 4, 2),
    256: (32, 64, 4, 3),
    512: (32, 32, 4, 2),
    1024: (16, 32, 8, 1),
  },
  'bias': {
    64: (64, 64, 4, 3),
    128: (64, 64, 4, 2),
    256: (64, 64, 8, 2),
    512: (32, 32, 4, 2),
    1024: (16, 32, 8, 1),
  },
}


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a kernel runs."""

  queries: int  # per block
  keys: int
  warps: int
  stages: int  # of the pipeline that loads blocks
  interpret: bool = False  # on a CPU, as plain JAX

  @classmethod
  def choose(cls, kernel: str, shape: Shape, arrays, settings) -> 'Launch':
    """Choose by the bytes of a position in one head; see `_LAUNCHES`."""
    query, *_, options = arrays[:4]
    channels = next_power(max(shape.key_size, shape.value_size))
    size = channels * query.dtype.itemsize
    sizes = _LAUNCHES[kernel]
    limit = min(limit for limit in sizes if size <= limit)
    queries, keys, warps, stages = sizes[limit]
    queries = min(queries, next_power(shape.num_query))
    keys = min(keys, next_power(shape.num_key))
    # Shared memory: what a program keeps, and what each stage loads.
    kept, loaded = {
      'forward': (queries, 2 * keys),
      'query': (2 * queries, 2 * keys),
      'key': (2 * keys, 2 * queries),
      'bias': (0, 2 * (queries + keys)),
    }[kernel]
    loaded *= size
    if kernel != 'bias' and isinstance(options.bias, PerRow):
      loaded += queries * keys * options.bias.array.dtype.itemsize
    stages = max(1, min(stages, (_SHARED_MEMORY - kept * size) // loaded))
    return cls(queries, keys, warps, stages, settings.interpret)


def next_power(n):
  """The least power of two >= n and >= 16, the smallest matmul size."""
  return max(16, 2 ** math.ceil(math.log2(n)))
