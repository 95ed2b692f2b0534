"""Stacks of blocks named block_0, block_1, …"""

import haiku as hk


def run_blocks(
  block, num_layers: int, x, *, use_scan: bool = False, use_remat: bool = False
):
  """Apply block('block_0', ·), then block('block_1', ·), and so on.

  Parameters have the same paths and initial values with any options.

  Args:
    block: a function (name, x) -> x of the same shape that creates a module of
      that name.
    num_layers: the number of blocks.
    x: an array, or a tree of arrays.
    use_scan: compile apply block for all layers (`hk.layer_stack`). Compilation
      time is then independent of depth, at the cost of a copy of the
      parameters.
    use_remat: store only the inputs of each block for the backward pass and
      recompute the rest (`hk.remat`). This saves memory for about a third more
      work. On CPU it saves memory only with `use_scan`.

  Returns:
    The output of the last block.
  """
  if hk.running_init():
    use_scan = use_remat = False

  def run(name, x):
    def apply(x):
      return block(name, x)

    return hk.remat(apply)(x) if use_remat else apply(x)

  if use_scan and num_layers:
    return hk.layer_stack(
      num_layers, transparent=True, transparency_map=_BlockNames()
    )(lambda x: run('block', x))(x)
  for i in range(num_layers):
    x = run(f'block_{i}', x)
  return x


class _BlockNames(hk.LayerStackTransparencyMapping):
  """Maps gpt/block/attention of layer 2 to gpt/block_2/attention."""

  def stacked_to_flat(self, stacked_module_name, scan_idx):
    head, *tail = stacked_module_name.split('/')
    assert head == 'block'
    return '/'.join([f'block_{scan_idx}', *tail])

  def flat_to_stacked(self, unstacked_module_name):
    head, *tail = unstacked_module_name.split('/')
    if not head.startswith('block_'):
      return None
    return '/'.join(['block', *tail]), int(head.removeprefix('block_'))
