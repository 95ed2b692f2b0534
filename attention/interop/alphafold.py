"""AlphaFold's classes, names and signatures on top of this library's modules.

`use_in` substitutes them in AlphaFold's own code. `load_params` and
`save_params` read and write AlphaFold's published parameters.
"""

import contextlib
import inspect
import sys
import types

import haiku as hk
import jax
import jax.numpy as jnp

from attention.interop.alphafold_npz import (
  evoformer_scope,
  load_params,
  save_params,
)
from attention.modules import evoformer, gated

__all__ = [
  'Attention',
  'EvoformerIteration',
  'GlobalAttention',
  'MSAColumnAttention',
  'MSAColumnGlobalAttention',
  'MSARowAttentionWithPairBias',
  'OuterProductMean',
  'Transition',
  'TriangleAttention',
  'TriangleMultiplication',
  'evoformer_scope',
  'load_params',
  'save_params',
  'use_in',
]

# Values of AlphaFold's own config (monomer, full depth), for error messages.
_DEFAULTS = {
  'num_head': '8 for the alignment, 4 for pairs',
  'gating': 'True',
  'orientation': "'per_row' along rows, 'per_column' along columns",
  'num_intermediate_factor': '4',
  'num_intermediate_channel': '128',
  'num_outer_channel': '32',
  'equation': "'ikc,jkc->ijc' for outgoing edges, 'kjc,kic->ijc' for incoming",
  'fuse_projection_weights': 'False, and True in multimer v3',
  'first': 'False, and True in multimer',
  'dropout_rate': '0.15 in row attention, 0.25 in triangles, 0 elsewhere',
  'shared_dropout': 'True',
  'zero_init': 'True',
  'deterministic': 'False',
}

_MASKING_BIAS = -1e3  # lower biases mask a key


def _read(config, key, name='config'):
  try:
    return getattr(config, key)
  except AttributeError:
    default = _DEFAULTS.get(key, 'a config for that layer')
    raise ValueError(
      f'{name}: expected a key {key!r}, got none; AlphaFold uses {default}'
    ) from None


def _attention_fields(config, global_config):
  """The constructor fields shared by all attention modules."""
  num_head = _read(config, 'num_head')
  sizes = {}
  for key, field in (('key_dim', 'key_size'), ('value_dim', 'value_size')):
    total = getattr(config, key, None)
    if total is not None and total % num_head:
      raise ValueError(
        f'{key}: expected a multiple of num_head={num_head}, got {total}'
      )
    sizes[field] = None if total is None else total // num_head
  return dict(
    num_head=num_head,
    gating=_read(config, 'gating'),
    zero_init=_read(global_config, 'zero_init', 'global_config'),
    **sizes,
  )


def _check_orientation(config, *known):
  orientation = _read(config, 'orientation')
  if orientation not in known:
    raise ValueError(
      f'orientation: expected {" or ".join(map(repr, known))}, '
      f'got {orientation!r}'
    )
  return orientation


def _to_boolean(mask):
  """Convert a mask of 0 and 1 in any dtype to boolean."""
  return jnp.asarray(mask) != 0


class Attention(gated.GatedAttention):
  """`GatedAttention` from AlphaFold's config."""

  def __init__(self, config, global_config, output_dim, name='attention'):
    fields = _attention_fields(config, global_config)
    super().__init__(**fields, output_size=output_dim, name=name)
    self.config, self.global_config = config, global_config
    self.output_dim = output_dim

  def __call__(self, q_data, m_data, mask, nonbatched_bias=None):
    """Attend from `q_data` to `m_data`.

    Args:
      q_data: query input [b, q, a].
      m_data: key and value input [b, k, a'].
      mask: [b, q, k], or [b or 1, h or 1, q or 1, k] with a head axis; 0 where
        a key is masked.
      nonbatched_bias: [h, q, k], or [q, k], which all heads share.

    Returns:
      [b, q, output_dim].
    """
    mask = jnp.asarray(mask)
    if mask.ndim == q_data.ndim:
      mask = mask[..., None, :, :]
    if nonbatched_bias is not None and jnp.ndim(nonbatched_bias) == 2:
      nonbatched_bias = nonbatched_bias[None]
    return super().__call__(q_data, m_data, _to_boolean(mask), nonbatched_bias)


class _AttentionWithBias(Attention):
  """`Attention` with the signature of ColabFold and older AlphaFold versions.

  It takes an additive mask instead of a boolean one: 0, or a large negative
  number at masked keys.
  """

  def __call__(self, q_data, m_data, bias, nonbatched_bias=None):
    mask = jnp.asarray(bias) > _MASKING_BIAS
    return super().__call__(q_data, m_data, mask, nonbatched_bias)


class GlobalAttention(gated.GlobalAttention):
  """`GlobalAttention` from AlphaFold's config."""

  def __init__(self, config, global_config, output_dim, name='attention'):
    fields = _attention_fields(config, global_config)
    super().__init__(**fields, output_size=output_dim, name=name)
    self.config, self.global_config = config, global_config
    self.output_dim = output_dim

  def __call__(self, q_data, m_data, q_mask):
    return super().__call__(q_data, m_data, _to_boolean(q_mask))


class MSARowAttentionWithPairBias(evoformer.MSARowAttentionWithPairBias):
  """`MSARowAttentionWithPairBias` from AlphaFold's config."""

  def __init__(
    self, config, global_config, name='msa_row_attention_with_pair_bias'
  ):
    _check_orientation(config, 'per_row')
    super().__init__(**_attention_fields(config, global_config), name=name)
    self.config, self.global_config = config, global_config

  def __call__(self, msa_act, msa_mask, pair_act, is_training=False):
    return super().__call__(msa_act, _to_boolean(msa_mask), pair_act)


class MSAColumnAttention(evoformer.MSAColumnAttention):
  """`MSAColumnAttention` from AlphaFold's config."""

  def __init__(self, config, global_config, name='msa_column_attention'):
    _check_orientation(config, 'per_column')
    super().__init__(**_attention_fields(config, global_config), name=name)
    self.config, self.global_config = config, global_config

  def __call__(self, msa_act, msa_mask, is_training=False):
    return super().__call__(msa_act, _to_boolean(msa_mask))


class MSAColumnGlobalAttention(evoformer.MSAColumnGlobalAttention):
  """`MSAColumnGlobalAttention` from AlphaFold's config."""

  def __init__(self, config, global_config, name='msa_column_global_attention'):
    _check_orientation(config, 'per_column')
    super().__init__(**_attention_fields(config, global_config), name=name)
    self.config, self.global_config = config, global_config

  def __call__(self, msa_act, msa_mask, is_training=False):
    return super().__call__(msa_act, _to_boolean(msa_mask))


class TriangleAttention(evoformer.TriangleAttention):
  """`TriangleAttention` from AlphaFold's config."""

  def __init__(self, config, global_config, name='triangle_attention'):
    super().__init__(
      orientation=_check_orientation(config, 'per_row', 'per_column'),
      **_attention_fields(config, global_config),
      name=name,
    )
    self.config, self.global_config = config, global_config

  def __call__(self, pair_act, pair_mask, is_training=False):
    return super().__call__(pair_act, _to_boolean(pair_mask))


class TriangleMultiplication(evoformer.TriangleMultiplication):
  """`TriangleMultiplication` from AlphaFold's config."""

  def __init__(self, config, global_config, name='triangle_multiplication'):
    super().__init__(
      equation=_read(config, 'equation'),
      num_intermediate_channel=_read(config, 'num_intermediate_channel'),
      fuse_projection_weights=_read(config, 'fuse_projection_weights'),
      zero_init=_read(global_config, 'zero_init', 'global_config'),
      name=name,
    )
    self.config, self.global_config = config, global_config

  def __call__(self, left_act, left_mask, is_training=True):
    return super().__call__(left_act, _to_boolean(left_mask))


class Transition(evoformer.Transition):
  """`Transition` from AlphaFold's config."""

  def __init__(self, config, global_config, name='transition_block', axis=0):
    super().__init__(
      axis=axis,
      num_intermediate_factor=_read(config, 'num_intermediate_factor'),
      zero_init=_read(global_config, 'zero_init', 'global_config'),
      name=name,
    )
    self.config, self.global_config = config, global_config

  def __call__(self, act, mask, is_training=True):
    return super().__call__(act)


class OuterProductMean(evoformer.OuterProductMean):
  """`OuterProductMean` from AlphaFold's config."""

  def __init__(
    self, config, global_config, num_output_channel, name='outer_product_mean'
  ):
    super().__init__(
      output_size=num_output_channel,
      num_outer_channel=_read(config, 'num_outer_channel'),
      zero_init=_read(global_config, 'zero_init', 'global_config'),
      name=name,
    )
    self.config, self.global_config = config, global_config
    self.num_output_channel = num_output_channel

  def __call__(self, act, mask, is_training=True):
    return super().__call__(act, _to_boolean(mask))


class EvoformerIteration(hk.Module):
  """The Evoformer block from AlphaFold's config, including dropout.

  With the same key, its dropout masks equal AlphaFold's.
  """

  def __init__(
    self, config, global_config, is_extra_msa, name='evoformer_iteration'
  ):
    super().__init__(name=name)
    self.config = config
    self.global_config = global_config
    self.is_extra_msa = is_extra_msa

  def __call__(self, activations, masks, is_training=True, safe_key=None):
    """Apply the block.

    Args:
      activations: dict with 'msa' [s, i, a] and 'pair' [i, i, a'].
      masks: dict with 'msa' [s, i] and 'pair' [i, i], of 0 and 1.
      is_training: whether to apply dropout.
      safe_key: AlphaFold's `SafeKey`; by default Haiku's RNG is used.

    Returns:
      The updated activations, a dict like `activations`.

    Raises:
      ValueError: If the config lacks a key or the shapes are incompatible.
    """
    config, global_config = self.config, self.global_config
    keys = iter(_layer_keys(safe_key))
    is_dropping = not _read(global_config, 'deterministic', 'global_config')
    is_dropping &= is_training or getattr(global_config, 'eval_dropout', False)

    def drop(layer, update):
      key, rate = next(keys), _read(layer.config, 'dropout_rate')
      if not is_dropping or not rate:
        return update
      axis = None
      if _read(layer.config, 'shared_dropout'):
        axis = 0 if _read(layer.config, 'orientation') == 'per_row' else 1
      return evoformer.drop_shared(key(), rate, axis, update)

    msa_act, pair_act = evoformer.update_in_turn(
      self._layers(activations['pair'].shape[-1]),
      activations['msa'],
      activations['pair'],
      masks['msa'],
      masks['pair'],
      outer_first=_read(_read(config, 'outer_product_mean'), 'first'),
      drop=drop,
    )
    return {'msa': msa_act, 'pair': pair_act}

  @hk.transparent
  def _layers(self, pair_size):
    def make(layer, name, config_name=None, **arguments):
      config = _read(self.config, config_name or name)
      return layer(config, self.global_config, name=name, **arguments)

    if self.is_extra_msa:
      column = make(
        MSAColumnGlobalAttention,
        'msa_column_global_attention',
        'msa_column_attention',
      )
    else:
      column = make(MSAColumnAttention, 'msa_column_attention')
    return [
      make(MSARowAttentionWithPairBias, 'msa_row_attention_with_pair_bias'),
      column,
      make(Transition, 'msa_transition', axis=1),
      make(
        OuterProductMean, 'outer_product_mean', num_output_channel=pair_size
      ),
      make(TriangleMultiplication, 'triangle_multiplication_outgoing'),
      make(TriangleMultiplication, 'triangle_multiplication_incoming'),
      make(TriangleAttention, 'triangle_attention_starting_node'),
      make(TriangleAttention, 'triangle_attention_ending_node'),
      make(Transition, 'pair_transition'),
    ]


def _layer_keys(safe_key):
  """Per layer, a function that returns its key, split as in AlphaFold."""
  if safe_key is not None:
    return [key.get for key in safe_key.split(10)[1:]]
  rng = hk.maybe_next_rng_key()
  if rng is None:
    return [hk.next_rng_key] * 9  # raises, if called
  return [lambda key=key: key for key in jax.random.split(rng, 10)[1:]]


_CLASSES = (
  Attention,
  GlobalAttention,
  MSARowAttentionWithPairBias,
  MSAColumnAttention,
  MSAColumnGlobalAttention,
  TriangleAttention,
  TriangleMultiplication,
  Transition,
  OuterProductMean,
  EvoformerIteration,
)


@contextlib.contextmanager
def use_in(modules):
  """Run AlphaFold's code on this library's modules inside the `with` block.

  The classes of this file replace those of the same names, whether `Attention`
  takes a mask or, as in ColabFold, a bias. Within AlphaFold's package, `jnp`
  also accepts argument names that JAX has removed (a_min and a_max of `clip`).
  Everything is restored on exit. JAX's caches are cleared on entry and exit,
  because functions jitted earlier would keep the classes they were traced with.

  Args:
    modules: AlphaFold's `modules.py`, imported as a module.

  Raises:
    ValueError: If `modules` has none of the classes.
  """
  classes = {
    cls.__name__: cls for cls in _CLASSES if hasattr(modules, cls.__name__)
  }
  if not classes:
    raise ValueError(
      "modules: expected AlphaFold's modules.py as a module, got "
      f'{modules!r}, which has none of its classes'
    )
  if 'Attention' in classes and _takes_bias(modules.Attention):
    classes['Attention'] = _AttentionWithBias
  changes = [(modules, name, cls) for name, cls in classes.items()]
  changes += [(m, 'jnp', _LegacyNumpy()) for m in _modules_with_jnp(modules)]
  before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
  try:
    for owner, name, value in changes:
      setattr(owner, name, value)
    jax.clear_caches()
    yield
  finally:
    for owner, name, value in before:
      setattr(owner, name, value)
    jax.clear_caches()


def _takes_bias(attention):
  """Whether `Attention` takes a bias instead of the mask of recent versions."""
  return 'bias' in inspect.signature(attention.__call__).parameters


def _modules_with_jnp(modules):
  """The modules of the package that import `jax.numpy` as `jnp`."""
  package = getattr(modules, '__name__', '').rpartition('.')[0]
  found = {id(modules): modules}
  for name, module in list(sys.modules.items()):
    if package and name.startswith(f'{package}.'):
      found[id(module)] = module
  return [m for m in found.values() if getattr(m, 'jnp', None) is jnp]


class _LegacyNumpy(types.ModuleType):
  """`jax.numpy` with support for `clip(a, a_min=…, a_max=…)`."""

  def __init__(self):
    super().__init__(jnp.__name__)

  def __getattr__(self, name):
    return getattr(jnp, name)

  @staticmethod
  def clip(a=None, a_min=None, a_max=None, *, min=None, max=None):
    """Clip values, as `numpy.clip`."""
    return jnp.clip(
      a, min if a_min is None else a_min, max if a_max is None else a_max
    )
