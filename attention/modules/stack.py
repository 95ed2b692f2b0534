"""Stacks of blocks named block_0, block_1, …"""

import dataclasses

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
  """Apply block(0, ·), then block(1, ·), and so on.

  Parameters have the same paths and initial values with any options.

  Args:
    block: a function (layer, x) -> x of the same shape that creates a module
      named block_<layer>.
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

  def run(layers, x):
    for layer in layers:

      def apply(x, layer=layer):
        return block(layer, x)

      x = hk.remat(apply)(x) if use_remat else apply(x)
    return x

  count = num_layers // period if use_scan else 0
  if count:
    names = _BlockNames(count, period)
    stack = hk.layer_stack(count, transparent=True, transparency_map=names)
    x = stack(lambda x: run(range(period), x))(x)
  return run(range(count * period, num_layers), x)


@dataclasses.dataclass(frozen=True)
class _BlockNames(hk.LayerStackTransparencyMapping):
  """Maps block_1/attention of iteration 2 to block_7/attention, of period 3."""

  count: int  # iterations
  period: int

  def stacked_to_flat(self, stacked_module_name, scan_idx):
    head, *tail = stacked_module_name.split('/')
    layer = scan_idx * self.period + int(head.removeprefix('block_'))
    return '/'.join([f'block_{layer}', *tail])

  def flat_to_stacked(self, unstacked_module_name):
    head, *tail = unstacked_module_name.split('/')
    if not head.startswith('block_'):
      return None
    iteration, layer = divmod(int(head.removeprefix('block_')), self.period)
    if iteration >= self.count:
      return None
    return '/'.join([f'block_{layer}', *tail]), iteration
