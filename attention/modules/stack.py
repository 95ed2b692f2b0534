"""Blocks on top of each other: block_0, block_1, …"""

import haiku as hk


def run_blocks(
  block, num_layers: int, x, *, use_scan: bool = False, use_remat: bool = False
):
  """block('block_1', block('block_0', x)), and so on.

  Parameters have the same paths and initial values whatever is chosen.

  Args:
    block: (name, x) -> x of the same shape; makes a module of that name.
    num_layers: how many there are.
    x: an array, or a tree of them.
    use_scan: compile one block for all layers (`hk.layer_stack`): a compilation
      that doesn't grow with the layers, for a copy of their parameters.
    use_remat: keep only what goes from block to block for the gradient, and
      compute the rest again (`hk.remat`): less memory, about a third more work.
      On CPU it saves memory only with `use_scan`.

  Returns:
    What the last block gives.
  """
  if hk.running_init():
    use_scan = use_remat = False

  def run(name, x):
    def one(x):
      return block(name, x)

    return hk.remat(one)(x) if use_remat else one(x)

  if use_scan and num_layers:
    return hk.layer_stack(
      num_layers, transparent=True, transparency_map=_Names()
    )(lambda x: run('block', x))(x)
  for i in range(num_layers):
    x = run(f'block_{i}', x)
  return x


class _Names(hk.LayerStackTransparencyMapping):
  """gpt/block/attention of layer 2 is gpt/block_2/attention."""

  def stacked_to_flat(self, stacked_module_name, scan_idx):
    head, *tail = stacked_module_name.split('/')
    assert head == 'block'
    return '/'.join([f'block_{scan_idx}', *tail])

  def flat_to_stacked(self, unstacked_module_name):
    head, *tail = unstacked_module_name.split('/')
    if not head.startswith('block_'):
      return None
    return '/'.join(['block', *tail]), int(head.removeprefix('block_'))
