"""Checks of the arguments of the Evoformer's layers."""

import jax.numpy as jnp


def check_mask(act, mask, act_name, mask_name):
  """Validate the mask against `act` and return it as an array."""
  mask = jnp.asarray(mask)
  if act.ndim != 3:
    raise ValueError(
      f'{act_name}: expected [rows, residues, channels], got shape {act.shape}'
    )
  if mask.dtype != bool:
    raise ValueError(
      f'{mask_name}: expected booleans (True = valid), got {mask.dtype}; '
      f'compare: {mask_name} != 0'
    )
  if mask.shape != act.shape[:2]:
    raise ValueError(
      f'{mask_name}: expected shape {act.shape[:2]} to match {act_name}, '
      f'got {mask.shape}'
    )
  return mask
