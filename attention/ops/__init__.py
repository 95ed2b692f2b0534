"""Pure functions on arrays: attention, masks, positions. JAX only."""
