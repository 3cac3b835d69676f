"""95% intervals: sums and differences of them, and how they are written.

A difference counts only where its interval leaves out zero. The interval of a
difference, and of any weighted sum, comes from the intervals of its parts taken
as independent (Zou and Donner's method of variance estimates recovery, 2008),
which is cautious for models scored on the same prompts.
"""

import math
from collections.abc import Sequence

Interval = tuple[float, float, float]


def combined(parts: Sequence[tuple[float, Interval]]) -> Interval:
  """Mean and 95% interval of sum(weight * part) of independent parts."""
  mean = math.fsum(w * p[0] for w, p in parts)
  down = up = 0.0
  for weight, (value, low, high) in parts:
    below, above = weight * (value - low), weight * (high - value)
    if weight < 0:
      below, above = -above, -below
    down, up = down + below**2, up + above**2
  return mean, mean - math.sqrt(down), mean + math.sqrt(up)


def verdict(difference: Interval) -> str:
  """'higher', 'lower' or 'no measurable difference'."""
  if difference[1] > 0:
    return 'higher'
  return 'lower' if difference[2] < 0 else 'no measurable difference'


def stated(value: Interval, digits: int = 3) -> str:
  """'0.704 [0.682, 0.726]'."""
  # A zero has no sign; + 0.0 takes it from what rounds to zero.
  mean, low, high = (f'{round(v, digits) + 0.0:.{digits}f}' for v in value)
  return f'{mean} [{low}, {high}]'


def change(value: Interval, digits: int = 3) -> str:
  """The same of a difference, with its sign."""
  mean, low, high = (f'{v:+.{digits}f}' for v in value)
  return f'{mean} [{low}, {high}]'.replace('-', '−')
