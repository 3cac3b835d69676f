"""Models of an evaluation as points of a chart, and the paths that join them.

Nothing is drawn here, and nothing is said of them.
"""

from typing import Any, NamedTuple

from alignjax.report import grid, ink
from alignjax.report.read import interval

FRONT = ('kl', 'reward')  # what is to the right, and what upwards


class Point(NamedTuple):
  """One model on the front.

  Attributes:
    rate: of LITI, else None.
    x, y: (mean, low, high).
    series: which of several LITI paths it is on.
    look: of its kind or arm.
    arm: of an experiment, '' for none.
    numbers: of a point of a grid, as its label.
  """

  name: str
  kind: str
  rate: float | None
  x: tuple[float, float, float]
  y: tuple[float, float, float]
  series: str
  look: ink.Look
  arm: str
  numbers: str


def points(
  evaluation: dict[str, Any], fields: tuple[str, str] = FRONT
) -> list[Point]:
  """The models of an evaluation that have both, as in tables and legends."""
  out = []
  looks = ink.looks(evaluation['models'])
  for model in ink.ordered(evaluation['models']):
    x, y = (interval(model, field) for field in fields)
    if x is None or y is None:
      continue
    kind, series = str(model.get('kind', 'other')), model.get('series') or ''
    rate, name = model.get('liti_rate'), model['name']
    said = grid.label(model.get('numbers') or {})
    out.append(
      Point(name, kind, rate, x, y, series, looks[name], ink.arm(model), said)
    )
  return out


def sweeps(
  evaluation: dict[str, Any], fields: tuple[str, str] = FRONT
) -> dict[str, list[Point]]:
  """The LITI paths by series; each from the init (rate 0) to SLERP (rate 1).

  The ends are the init and SLERP by definition, so they are added where a
  sweep does not hold them. Empty when nothing was interpolated.
  """
  every = points(evaluation, fields)
  paths: dict[str, list[Point]] = {}
  for p in every:
    if p.kind == 'liti' and p.rate is not None:
      paths.setdefault(p.series, []).append(p)
  for series, path in paths.items():
    for kind, rate in (('init', 0.0), ('slerp', 1.0)):
      ends = [p for p in every if p.kind == kind and p.series in ('', series)]
      if ends and all(p.rate != rate for p in path):
        path.append(ends[0]._replace(rate=rate))
    path.sort(key=lambda p: p.rate or 0.0)
  return paths


def sweep(evaluation: dict[str, Any]) -> list[Point]:
  """The last of the LITI paths: the latest round; [] where there is none."""
  paths = list(sweeps(evaluation).values())
  return paths[-1] if paths else []
