"""The files in a workdir: config, data, metrics, checkpoints and the lock."""
