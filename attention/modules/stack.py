"""Stacks of blocks named block_0, block_1, …"""

import dataclasses
import functools

import haiku as hk


def run_blocks(
  block,
  num_layers: int,
  x,
  *,
  use_scan: bool = False,
  use_remat: bool = False,
  period: int = 1,
):
  """Apply block('block_0', 0, ·), then block('block_1', 1, ·), and so on.

  Parameters have the same paths and initial values with any options.

  Args:
    block: a function (name, layer, x) -> x of the same shape that creates a
      module of that name.
    num_layers: the number of blocks.
    x: an array, or a tree of arrays.
    use_scan: compile one period of blocks for all layers (`hk.layer_stack`),
      and the blocks that remain. Compilation time is then independent of depth,
      at the cost of a copy of the parameters.
    use_remat: store only the inputs of each block for the backward pass and
      recompute the rest (`hk.remat`). This saves memory for about a third more
      work. On CPU it saves memory only with `use_scan`.
    period: block n and block n + period differ only in their parameters.

  Returns:
    The output of the last block.
  """
  if hk.running_init():
    use_scan = use_remat = False

  def run(names, x):
    for layer, name in names.items():
      apply = functools.partial(block, name, layer)
      x = hk.remat(apply)(x) if use_remat else apply(x)
    return x

  names = {i: f'block_{i}' for i in range(num_layers)}
  count = num_layers // period if use_scan else 0
  if count:
    stacked = (
      {i: names[i] for i in range(period)} if period > 1 else {0: 'block'}
    )
    stack = hk.layer_stack(
      count, transparent=True, transparency_map=_BlockNames(count, period)
    )
    x = stack(lambda x: run(stacked, x))(x)
  return run({i: names[i] for i in range(count * period, num_layers)}, x)


@dataclasses.dataclass(frozen=True)
class _BlockNames(hk.LayerStackTransparencyMapping):
  """Maps block_1/attention of iteration 2 to block_7/attention, of period 3.

  Of period 1, it maps block/attention of iteration 2 to block_2/attention.
  """

  count: int  # iterations
  period: int

  def stacked_to_flat(self, stacked_module_name, scan_idx):
    head, *tail = stacked_module_name.split('/')
    first = 0 if self.period == 1 else int(head.removeprefix('block_'))
    layer = scan_idx * self.period + first
    return '/'.join([f'block_{layer}', *tail])

  def flat_to_stacked(self, unstacked_module_name):
    head, *tail = unstacked_module_name.split('/')
    if not head.startswith('block_'):
      return None
    iteration, layer = divmod(int(head.removeprefix('block_')), self.period)
    if iteration >= self.count:
      return None
    head = 'block' if self.period == 1 else f'block_{layer}'
    return '/'.join([head, *tail]), iteration
