"""Data sets: numpy and grain, indexed by (seed, step)."""
