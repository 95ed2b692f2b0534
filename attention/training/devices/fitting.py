"""Which batch fits a device's memory, from what a few of them need."""


def largest(points: dict[int, int], limit: int, unit: int, cap: int) -> int:
  """The largest batch that fits, as far as the points show.

  Memory is about a line of the batch. The two points that are nearest to the
  limit tell the line; what is measured stays between what fits and what
  doesn't.

  Args:
    points: bytes that a device needs, by batch: of 0, what no batch changes,
      and of one batch or more.
    limit: bytes that a device has.
    unit: what divides every batch.
    cap: the largest batch that is looked for.

  Returns:
    The batch, 0 if none fits. If it isn't among the points, it is worth
    measuring; if it is, the next larger one doesn't fit or isn't looked for.
  """
  near = sorted(points, key=lambda n: abs(points[n] - limit))[:2]
  (low, first), (high, last) = sorted((n, points[n]) for n in near)
  batch = low + (limit - first) * (high - low) / max(last - first, 1)
  fitting = max((n for n in points if points[n] <= limit), default=0)
  others = (n - unit for n in points if points[n] > limit)
  return max(fitting, min([int(batch // unit) * unit, cap, *others]))
