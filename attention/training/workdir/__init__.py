"""The files of a workdir: config, data, metrics, checkpoints and the lock."""
