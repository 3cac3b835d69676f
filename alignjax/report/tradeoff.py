"""Two rewards against each other: one line per steerable policy.

For an evaluation that names two `objectives` and gives the weights of its
models. A policy is what its models share of their names: all but the last word.
It fits nothing; hypervolume and steerability are computed from the means, so
they inherit their noise.
"""

import itertools
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from alignjax.report import arms, ink
from alignjax.report.read import interval

WIDTH, HEIGHT = 1000, 520


class Line(NamedTuple):
  """The models of one policy, by the weight of the first objective.

  `points` are (weight, (mean, low, high) of each objective).
  """

  kind: str
  look: ink.Look
  points: list[tuple[float, tuple, tuple]]


def lines(evaluation: dict[str, Any]) -> dict[str, Line]:
  """Policies by name; empty unless there are two objectives."""
  objectives = evaluation.get('objectives') or []
  found: dict[str, Line] = {}
  if len(objectives) != 2:
    return found
  looks = ink.looks(evaluation['models'])
  for model in evaluation['models']:
    weights, scores = model.get('weights'), model.get('scores') or {}
    x, y = (interval(scores, name) for name in objectives)
    # More than two weights: the last is the reference's, another KL strength.
    if x and y and weights and len(weights) == 2:
      policy = model['name'].rpartition(' ')[0] or model['name']
      kind, look = str(model.get('kind')), looks[model['name']]
      line = found.setdefault(policy, Line(kind, look, []))
      line.points.append((weights[0], x, y))
  return {k: v._replace(points=sorted(v.points)) for k, v in found.items()}


def hypervolume(
  points: Sequence[tuple[float, float]], reference: tuple[float, float]
) -> float:
  """The area that points dominate above `reference`; more is better."""
  area, height = 0.0, reference[1]
  for x, y in sorted(points, reverse=True):  # from the right
    if x > reference[0] and y > height:
      area += (x - reference[0]) * (y - height)
      height = y
  return area


def steerability(points: Sequence[tuple[float, tuple, tuple]]) -> float:
  """How often an objective's mean rises with its weight, over all pairs.

  1 is always, 0.5 is chance; a tie counts half. 0 for a single point.
  """
  said = []
  for (_, x, y), (_, more_x, less_y) in itertools.combinations(points, 2):
    for rise in (more_x[0] - x[0], y[0] - less_y[0]):
      said.append(1.0 if rise > 0 else 0.5 if rise == 0 else 0.0)
  return sum(said) / len(said) if said else 0.0


def tradeoff_lines(evaluation: dict[str, Any]) -> list[str]:
  """Sentences: who dominates most, and who can be steered; [] for no lines."""
  found = lines(evaluation)
  if not found:
    return []
  corner, kinds = _corner(found), _kinds(found)
  areas = {k: [_area(line, corner) for line in of] for k, of in kinds.items()}
  order = sorted(areas, key=lambda k: -statistics.fmean(areas[k]))
  best, rest = order[0], order[1:]
  several = [k for k in rest if min(len(areas[k]), len(areas[best])) > 1]
  below = [k for k in several if max(areas[k]) < min(areas[best])]
  said = f'Hypervolume: {", ".join(f"{k} {_spread(areas[k])}" for k in order)}'
  if below:
    said += f'; every run of {best} is above every run of {", ".join(below)}'
  elif several:
    said += f'; no other policy has all its runs below those of {best}'
  elif rest:
    said += '; one run each tells no difference'
  steered = {
    k: _spread([steerability(line.points) for line in of])
    for k, of in kinds.items()
  }
  told = ', '.join(f'{k} {x}' for k, x in steered.items())
  return [
    f'{said}.',
    'How often an objective rises with its weight (1 is always, 0.5 is '
    f'chance): {told}.',
  ]


def tradeoff_html(evaluation: dict[str, Any], salt: str) -> str:
  """The chart and a table of policies; '' where there is nothing to draw."""
  found = lines(evaluation)
  if not found:
    return ''
  corner, kinds = _corner(found), _kinds(found)
  with ink.style(salt):
    chart = ink.svg(draw(evaluation), 'Two objectives against each other')
  rows = ''.join(
    f'<tr><td>{escape(kind)}</td><td>{len(of)}</td>'
    f'<td>{_spread([_area(line, corner) for line in of])}</td>'
    f'<td>{_spread([steerability(line.points) for line in of])}</td></tr>'
    for kind, of in kinds.items()
  )
  first, second = map(escape, evaluation['objectives'])
  note = (
    'Each line is one policy at several weights, the mean of its runs; bars '
    'are 95% intervals. Hypervolume is the area it dominates above the '
    f'reference point ({corner[0]:.3g}, {corner[1]:.3g}), the worst mean of '
    'each objective here. Steerability is how often an objective rises with '
    'its weight, over all pairs of weights; 0.5 is chance. ± is the standard '
    'deviation over runs.'
  )
  return (
    f'<figure class="card wide"><div class="scroll">'
    f'{chart}</div><figcaption>{first} to the right, {second} upwards. '
    f'{note}</figcaption></figure>'
    '<div class="scroll"><table><thead><tr><th>policy</th><th>runs</th>'
    '<th>hypervolume</th><th>steerability</th></tr></thead>'
    f'<tbody>{rows}</tbody></table></div>'
  )


def draw(evaluation: dict[str, Any]) -> Figure:
  """The figure; must be called and written inside `ink.style`.

  Of arms under several seeds, the means.
  """
  figure = ink.canvas(WIDTH, HEIGHT)
  axes = figure.add_axes((0.066, 0.1, 0.918, 0.8))
  for kind, of in _kinds(lines(arms.pooled(evaluation))).items():
    for i, line in enumerate(of):
      xs = [x for _, x, _ in line.points]
      ys = [y for _, _, y in line.points]
      axes.errorbar(
        [x[0] for x in xs],
        [y[0] for y in ys],
        xerr=[[x[0] - x[1] for x in xs], [x[2] - x[0] for x in xs]],
        yerr=[[y[0] - y[1] for y in ys], [y[2] - y[0] for y in ys]],
        color=line.look.fill,
        ecolor=ink.paler(line.look.fill, 2),
        marker=line.look.marker,
        markersize=line.look.size,
        markeredgecolor='white',
        linewidth=1.6,
        elinewidth=0.8,
        label=None if i else kind,
      )
  first, second = evaluation['objectives']
  axes.set_xlabel(f'mean {first}', labelpad=7)
  axes.set_ylabel(f'mean {second}', labelpad=7)
  figure.legend(loc='upper left', ncols=6, frameon=False, fontsize=10.5)
  return figure


def _kinds(found: dict[str, Line]) -> dict[str, list[Line]]:
  kinds: dict[str, list[Line]] = {}
  for line in found.values():
    kinds.setdefault(line.kind, []).append(line)
  return kinds


def _corner(found: dict[str, Line]) -> tuple[float, float]:
  """The worst mean of each objective: where areas are measured from."""
  every = [(x[0], y[0]) for of in found.values() for _, x, y in of.points]
  return min(x for x, _ in every), min(y for _, y in every)


def _area(line: Line, corner: tuple[float, float]) -> float:
  return hypervolume([(x[0], y[0]) for _, x, y in line.points], corner)


def _spread(values: Sequence[float]) -> str:
  mean = f'{statistics.fmean(values):.3g}'
  if len(values) < 2:
    return mean
  return f'{mean} ± {statistics.stdev(values):.2g}'
