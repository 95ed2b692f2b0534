"""The largest batch that fits a device's memory, from a few measurements."""


def largest(points: dict[int, int], limit: int, unit: int, cap: int) -> int:
  """Estimate the largest batch size that fits.

  Memory is roughly linear in the batch size. The two points nearest to the
  limit determine the line. The estimate is at least the largest batch size
  known to fit, and below the smallest known not to fit.

  Args:
    points: bytes needed per device, by batch size. Contains 0, the bytes that
      do not depend on the batch, and at least one other batch size.
    limit: bytes available per device.
    unit: batch sizes are multiples of this.
    cap: the largest batch size to consider.

  Returns:
    The batch size, or 0 if none fits. If it is not among the points, it should
    be measured next. If it is, the next larger batch size does not fit or
    exceeds `cap`.
  """
  near = sorted(points, key=lambda n: abs(points[n] - limit))[:2]
  (low, first), (high, last) = sorted((n, points[n]) for n in near)
  batch = low + (limit - first) * (high - low) / max(last - first, 1)
  fitting = max((n for n in points if points[n] <= limit), default=0)
  others = (n - unit for n in points if points[n] > limit)
  return max(fitting, min([int(batch // unit) * unit, cap, *others]))
