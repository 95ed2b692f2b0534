"""The files in a workdir: config, data, metrics, checkpoints and the lock."""


class Unusable(ValueError):
  """Raised if a run can neither start nor resume in its workdir."""
