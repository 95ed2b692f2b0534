"""What is wrong with arrays that came from somewhere else."""


def differences(found: dict, expected: dict) -> list[str]:
  """Lines on arrays that are missing, surplus and misshapen; none if all fit.

  Args:
    found: {name: shape}.
    expected: the same.
  """
  wrong = [
    f'{name} expected {expected[name]}, got {found[name]}'
    for name in sorted(expected.keys() & found.keys())
    if expected[name] != found[name]
  ]
  return [
    f'{kind} {", ".join(names)}'
    for kind, names in (
      ('missing', sorted(expected.keys() - found.keys())),
      ('surplus', sorted(found.keys() - expected.keys())),
      ('misshapen:', wrong),
    )
    if names
  ]
