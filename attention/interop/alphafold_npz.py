"""AlphaFold's published parameters: .npz files with keys `scope//name`."""

import collections
import contextlib
import os
import pathlib
import zipfile

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from attention.interop.shapes import differences
from attention.modules.evoformer import EvoformerStack

_HEADS = 'masked_msa_head', 'distogram_head'
_SCOPE = ('alphafold', 'alphafold_iteration', 'evoformer')
# {stack name: whether it processes the extra alignment}
_STACKS = {'evoformer_iteration': False, 'extra_msa_stack': True}


@contextlib.contextmanager
def evoformer_scope():
  """Create modules in the name scope of AlphaFold's Evoformer.

  In this scope `EvoformerStack(num_blocks=48, name='evoformer_iteration')` has
  the parameter paths of `load_params`.
  """
  with contextlib.ExitStack() as stack:
    for name in _SCOPE:
      stack.enter_context(hk.name_scope(name))
    yield


def load_params(path) -> dict:
  """Load AlphaFold's parameters.

  They can be used with AlphaFold itself, and with `EvoformerStack`s named
  'evoformer_iteration' and 'extra_msa_stack' inside `evoformer_scope()`. The
  shapes of these two stacks are checked; other arrays are returned unchecked.

  Args:
    path: an .npz file in the format that AlphaFold publishes.

  Returns:
    Haiku parameters {scope: {name: NumPy array}}.

  Raises:
    ValueError: If the file is not in that format or contains pickled objects,
      or if arrays are missing, unexpected or misshapen (all are listed).
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      flat = {key: arrays[key] for key in arrays.files}
  except (ValueError, TypeError, EOFError, zipfile.BadZipFile):
    raise ValueError(
      f'{path}: expected an .npz file of plain arrays, got another format, a '
      'damaged file or pickled objects'
    ) from None
  params = {}
  for key, array in flat.items():
    scope, separator, name = key.partition('//')
    if not separator:
      raise ValueError(f"{path}: expected keys 'scope//name', got {key!r}")
    params.setdefault(scope, {})[name] = array
  wrong = [line for stack in _STACKS for line in _differences(flat, stack)]
  if wrong:
    raise ValueError(f'{path}: {"; ".join(wrong)}')
  return params


def load_msa_params(path, like) -> dict:
  """Load AlphaFold's parameters for an `attention.models.msa.MSA`.

  AlphaFold adds constants from its templates' and recycled inputs' layers even
  where it has none; these become part of biases of the model.

  Args:
    path: as `load_params`.
    like: the model's parameters, or their shapes.

  Returns:
    Parameters like `like`, in float32.

  Raises:
    ValueError: as `load_params`, or if arrays of the model are missing in the
      file or have other shapes (all are listed).
  """
  params = load_params(path)
  iteration, trunk = '/'.join(_SCOPE[:2]), '/'.join(_SCOPE)

  def find(scope, name):
    return np.float32(params.get(scope, {}).get(name, np.nan))

  found, wrong = {}, []
  for scope, name, leaf in hk.data_structures.traverse(like):
    rest = scope.partition('/')[2]
    is_head = rest.startswith(_HEADS)
    source = f'{iteration if is_head else trunk}/{rest}', name
    if name == 'first_row':
      source = f'{trunk}/prev_msa_first_row_norm', 'offset'
    array = find(*source)
    if array.shape != leaf.shape:
      got = array.shape or 'none'
      wrong.append(f'{"//".join(source)}: expected {leaf.shape}, got {got}')
    elif (rest, name) == ('pair_activiations', 'bias'):
      array = array + find(f'{trunk}/prev_pos_linear', 'bias')
      array = array + find(f'{trunk}/prev_pair_norm', 'offset')
    found.setdefault(scope, {})[name] = array
  if wrong:
    raise ValueError(f'{path}: {"; ".join(wrong)}')
  return found


def save_params(path, params) -> None:
  """Write parameters to an .npz file for `load_params` and AlphaFold.

  Args:
    path: the output file. An existing file is replaced atomically, once
      everything is written.
    params: {scope: {name: array}}.

  Raises:
    ValueError: If there are no arrays, or a dtype is not supported by .npz
      files (for example bfloat16).
    FileNotFoundError: If the parent folder does not exist.
  """
  flat = {}
  for scope, arrays in params.items():
    for name, array in arrays.items():
      array = np.asarray(array)
      if array.dtype.kind in 'OV':
        raise ValueError(
          f'{scope}//{name}: expected a NumPy dtype, got {array.dtype}; '
          'convert with .astype(jnp.float32)'
        )
      flat[f'{scope}//{name}'] = array
  if not flat:
    raise ValueError('params: expected at least one array, got none')
  path = pathlib.Path(path)
  if not path.parent.is_dir():
    raise FileNotFoundError(f'{path.parent}: no such folder')
  part = path.with_name(f'{path.name}.part')
  with part.open('wb') as file:
    np.savez(file, **flat)
  os.replace(part, path)


def _differences(flat, stack):
  """Describe a stack's missing, unexpected and misshapen arrays."""
  prefix = '/'.join((*_SCOPE, stack))
  found = {
    key.removeprefix(f'{prefix}/'): array.shape
    for key, array in flat.items()
    if key.startswith((f'{prefix}/', f'{prefix}//'))
  }
  expected = _expected_shapes(found, _STACKS[stack])
  return [f'{prefix}: {line}' for line in differences(found, expected)]


def _expected_shapes(found, is_extra):
  """Names and shapes of an `EvoformerStack` with the sizes found in a file."""

  def size(default, axis, starts, *ends):
    return _most_common(
      (
        shape[axis]
        for name, shape in found.items()
        if name.startswith(starts) and name.endswith(ends) and len(shape) > 1
      ),
      default,
    )

  def count(*parts):
    return sum(any(part in name for part in parts) for name in found)

  pairs, product = ('triangle_', 'pair_'), 'triangle_multiplication_'
  wide = ('query_norm//scale', 'query_norm//offset', 'output_b', 'n2//bias')
  heads = ('gating_b', 'gating_w', 'query_w')
  msa_size = size(64 if is_extra else 256, -1, 'msa_', *wide)
  pair_size = size(128, -1, pairs, *wide)
  factors = (
    found.get(f'{layer}_transition/transition1//{leaf}', (4 * width,))[-1]
    / width
    for layer, width in (('msa', msa_size), ('pair', pair_size))
    for leaf in ('bias', 'weights')
  )
  fields = dict(
    is_extra_msa=is_extra,
    num_blocks=size(4 if is_extra else 48, 0, '', ''),
    num_msa_head=size(8, -2, 'msa_', *heads),
    num_pair_head=size(4, -2, pairs, *heads),
    num_outer_channel=size(32, -1, 'outer_', 'n//bias', 'n//weights'),
    num_intermediate_channel=size(128, -1, product, 'm//scale', 'm//offset'),
    num_intermediate_factor=_most_common(factors, 4),
    fuse_projection_weights=count('/projection//', '/gate//')
    > count('left_gate//', 'right_gate//', 'left_projection//'),
  )
  stack = hk.transform(
    lambda *act: EvoformerStack(**fields, name='stack')(*act)
  )
  shapes = jax.eval_shape(
    stack.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, 1, msa_size), jnp.float32),
    jax.ShapeDtypeStruct((1, 1, pair_size), jnp.float32),
  )
  return {
    f'{module.removeprefix("stack/")}//{name}': array.shape
    for module, name, array in hk.data_structures.traverse(shapes)
  }


def _most_common(values, default):
  """The most common value: one misshapen array must not change the sizes."""
  counts = collections.Counter(values).most_common(1)
  return counts[0][0] if counts else default
