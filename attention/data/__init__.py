"""Data sets in NumPy and Grain, indexed by (seed, step)."""
