"""Pure functions of arrays: attention, masks, positions. JAX only."""
