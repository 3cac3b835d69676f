"""Arms of an experiment: the models of several seeds, taken together.

Models of one evaluation that differ in their names only, and in what was
measured, are one arm under several seeds. Its mean is that of the seeds. Its
interval joins two sources in quadrature: the spread between the seeds (by
Student's t, for they are few), and the seeds' own intervals over prompts,
averaged and not made smaller by their number, for all answer the same prompts.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from alignjax.report import grid, ink
from alignjax.report.intervals import Interval
from alignjax.report.read import interval


def seeds(model: Mapping[str, Any]) -> int:
  """How many models one of `pooled` stands for."""
  return len(model.get('seeds') or (1,))


def of(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The arms of a pooled evaluation."""
  return [m for m in evaluation['models'] if seeds(m) > 1]


def pooled(evaluation: dict[str, Any]) -> dict[str, Any]:
  """The evaluation with one model for each arm, its `seeds` their names.

  The same object where no arm has several seeds.
  """
  found: dict[str, list[dict[str, Any]]] = {}
  for model in evaluation['models']:
    found.setdefault(_key(model), []).append(model)
  if len(found) == len(evaluation['models']):
    return evaluation
  names = [_arm(some[0]) for some in found.values()]
  models = [
    some[0]
    if len(some) == 1
    else _together(some, _name(some[0], alone=names.count(name) == 1))
    for name, some in zip(names, found.values())
  ]
  return evaluation | {'models': models}


def over_seeds(values: Sequence[Interval]) -> Interval:
  """Mean and 95% interval of an arm from those of two seeds or more."""
  means = [mean for mean, _, _ in values]
  mean, count = statistics.fmean(means), len(means)
  spread = statistics.stdev(means) / math.sqrt(count)
  spread *= float(stdtrit(count - 1, 0.975))
  down = statistics.fmean(mean - low for mean, low, _ in values)
  up = statistics.fmean(high - mean for mean, _, high in values)
  return mean, mean - math.hypot(spread, down), mean + math.hypot(spread, up)


def _arm(model: Mapping[str, Any]) -> str:
  """Its arm, or the path in weight space that it is on; '' for neither."""
  return ink.arm(model) or model.get('series') or ''


def _key(model: Mapping[str, Any]) -> str:
  arm = _arm(model)
  fields = ('kind', 'liti_rate', 'weights', 'numbers')
  return repr(
    (arm, [model.get(k) for k in fields], '' if arm else model['name'])
  )


def _name(model: Mapping[str, Any], *, alone: bool) -> str:
  """Its arm, and what tells it from others of the arm."""
  rate = model.get('liti_rate')
  numbers = dict(model.get('numbers') or {})
  numbers |= {} if rate is None else {'rate': rate}
  numbers |= {'weights': w} if (w := model.get('weights')) else {}
  arm = _arm(model)
  return arm if alone else f'{arm} {grid.label(numbers)}'.rstrip()


def _together(some: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
  first = some[0]
  pooled: dict[str, Any] = {'name': name, 'seeds': [m['name'] for m in some]}
  for field in ('kind', 'series', 'liti_rate', 'weights', 'numbers'):
    pooled[field] = first.get(field)
  pooled |= _intervals(some)
  scores = [m.get('scores') or {} for m in some]
  pooled['scores'] = _intervals(scores)
  shares = [m.get('indicators') or {} for m in some]
  pooled['indicators'] = {
    key: statistics.fmean(share[key] for share in shares)
    for key in shares[0]
    if all(key in share for share in shares)
  }
  return pooled


def _intervals(some: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Every interval that all of them have, over the seeds."""
  found = {}
  for key in some[0]:
    values = [value for m in some if (value := interval(m, key))]
    if len(values) == len(some):
      found[key] = dict(zip(('mean', 'low', 'high'), over_seeds(values)))
  return found
