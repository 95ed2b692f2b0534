"""Parallelism: device meshes, shardings and processes on several hosts."""
