"""Comparison of array shapes with those expected."""


def differences(found: dict, expected: dict) -> list[str]:
  """Describe missing, unexpected and misshapen arrays; empty if all match.

  Args:
    found: {name: shape}.
    expected: {name: shape}.
  """
  mismatched = [
    f'{name} expected {expected[name]}, got {found[name]}'
    for name in sorted(expected.keys() & found.keys())
    if expected[name] != found[name]
  ]
  return [
    f'{kind} {", ".join(names)}'
    for kind, names in (
      ('missing', sorted(expected.keys() - found.keys())),
      ('unexpected', sorted(found.keys() - expected.keys())),
      ('wrong shape:', mismatched),
    )
    if names
  ]
