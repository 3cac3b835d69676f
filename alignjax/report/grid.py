"""A grid over numbers: labels, paths and the Pareto front.

The points of one over merging methods are the models of the kind MERGED: their
`series` is the method, their `numbers` are what it was given. Those of an arm
tell it from others of its `series`. Nothing is drawn here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alignjax.report.read import interval

MERGED = 'merged'


def merged(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The models of a grid over merging methods."""
  return [m for m in evaluation['models'] if m.get('kind') == MERGED]


def label(numbers: Mapping[str, Any]) -> str:
  """'t 0.3', 'density 0.2, scale 1'; weights are joined by colons."""

  def said(value: Any) -> str:
    if isinstance(value, list | tuple):
      return ':'.join(f'{x:g}' for x in value)
    return f'{value:g}'

  return ', '.join(f'{name} {said(x)}' for name, x in numbers.items())


def paths(evaluation: Mapping[str, Any]) -> list[list[str]]:
  """Names of points in the order of the only number in which they differ.

  One path for each series in which one number varies; a series of which several
  do has none.
  """
  found = []
  points = [m for m in evaluation['models'] if m.get('numbers')]
  for series in dict.fromkeys(m.get('series') or '' for m in points):
    arm = [m for m in points if (m.get('series') or '') == series]
    varied = [
      name
      for name in arm[0].get('numbers') or {}
      if len({str((m.get('numbers') or {}).get(name)) for m in arm}) > 1
    ]
    if len(varied) == 1:
      (name,) = varied
      arm.sort(key=lambda m: m['numbers'][name])
      found.append([m['name'] for m in arm])
  return found


def pareto(models: Sequence[Mapping[str, Any]]) -> set[str]:
  """Names of models that no other one beats in mean reward against mean KL.

  One beats another with a reward that is no lower at a KL that is no higher,
  where not both are equal.
  """
  places = {}
  for model in models:
    reward, kl = interval(model, 'reward'), interval(model, 'kl')
    if reward is not None and kl is not None:
      places[model['name']] = reward[0], kl[0]
  return {
    name
    for name, (reward, kl) in places.items()
    if not any(
      r >= reward and k <= kl and (r, k) != (reward, kl)
      for r, k in places.values()
    )
  }
