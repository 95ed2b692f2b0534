"""Parallelism: device meshes, shardings and multi-process runs."""
