"""The numbers of a merge found by trying them, per group of layers.

A variable is a number of the method in one group of layers; `weights` have one
per model. CMA-ES (Hansen, arXiv 1604.00772; the library `cmaes`) proposes
values, whoever calls measures them. It looks at the order of the objectives
alone and needs neither gradients nor a model of the noise, and every trial is
measured on the same prompts with the same key: a Bayesian optimiser, made for
dearer trials, would bring dependencies and nothing else.

Each finished trial is a line of a file. A search that was interrupted tells the
optimiser what is there and goes on, to the result of one that was not. Nothing
here knows what is measured, or how a model is loaded.
"""

import json
import math
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignjax.core import files, lookup
from alignjax.core.errors import UserError
from alignjax.merge import method
from alignjax.merge.method import Method
from alignjax.system import metrics

SPREAD = 0.25  # of the first proposals, in widths of the intervals
WEIGHT = (0.0, 1.0)  # the interval of a weight, unless it is said
FEWEST = 4  # a population of fewer teaches CMA-ES nothing

Numbers = dict[str, list[Any]]  # name -> value per group; of weights, lists


class Space(NamedTuple):
  """What is searched.

  Attributes:
    intervals: number -> (low, high), both among its values.
    groups: equal parts of the depth, each with numbers of its own.
    layers: of the model.
    models: that are merged, each with a weight.
  """

  intervals: Mapping[str, tuple[float, float]]
  groups: int
  layers: int
  models: int

  def count(self, name: str) -> int:
    """Variables of a number in one group."""
    return self.models if name == 'weights' else 1

  @property
  def size(self) -> int:
    """How many variables there are."""
    return self.groups * sum(map(self.count, self.intervals))

  def part(self, group: int) -> range:
    """The layers of a group; parts differ by one layer at most."""
    start, stop = (
      -(-g * self.layers // self.groups) for g in (group, group + 1)
    )
    return range(start, stop)


def space(
  how: Method,
  names: Sequence[str],
  over: Sequence[str] = (),
  *,
  groups: int | None,
  layers: int,
  models: int,
  extrapolate: bool = False,
) -> Space:
  """The space of these numbers of a method. Raises UserError.

  Args:
    how: the method.
    names: of its numbers; whole numbers and seeds are not searched.
    over: 'name=low:high', where not the whole range of a number is searched,
      or where it has no end.
    groups: of layers; 4 by default, or all layers if they are fewer.
    layers: of the model.
    models: how many are merged.
    extrapolate: intervals of numbers that interpolate may go beyond their ends.
  """
  has = {**how.numbers}
  if how.weighted:
    has['weights'] = method.FACTOR
  for name in names:
    if name not in has:
      raise UserError(
        f'the method {how.name!r} has no number {name!r}'
        f'{lookup.nearest(name, has)} (it has {", ".join(has) or "none"})'
      )
    if has[name].whole:
      raise UserError(f'--numbers {name}: whole numbers are not searched')
  if not names or len(set(names)) < len(names):
    raise UserError(f'--numbers: expected different names, found {names}')
  groups = min(4, layers) if groups is None else groups
  if not 1 <= groups <= layers:
    raise UserError(
      f'--groups {groups}: expected 1 to {layers}, the layers of the model'
    )
  said = dict(map(_interval, over))
  for name in said:
    if name not in names:
      raise UserError(
        f'--over {name}: is not searched (--numbers {" ".join(names)})'
      )
  intervals = {}
  for name in names:
    allowed = has[name]
    default = WEIGHT if name == 'weights' else (allowed.low, allowed.high)
    low, high = said.get(name, default)
    if not (math.isfinite(low) and math.isfinite(high)):
      raise UserError(f'{name} has no ends: say between which, --over {name}=')
    for end in (low, high):
      method.check_number(f'--over: {name}', end, allowed, extrapolate)
    if not low < high:
      raise UserError(f'--over {name}={low:g}:{high:g}: expected low < high')
    intervals[name] = (float(low), float(high))
  return Space(intervals, groups, layers, models)


def _interval(text: str) -> tuple[str, tuple[float, float]]:
  try:
    name, ends = text.split('=')
    low, high = map(float, ends.split(':'))
  except ValueError:
    raise UserError(f'--over {text!r}: expected NAME=LOW:HIGH') from None
  if math.isnan(low) or math.isnan(high):
    raise UserError(f'--over {text!r}: expected numbers')
  return name, (low, high)


def numbers(of: Space, point: np.ndarray) -> Numbers:
  """The numbers at a point of the unit cube, with four digits.

  More would be noise, and what is read, recorded and merged is the same.
  """
  found: Numbers = {name: [] for name in of.intervals}
  values = iter(point.tolist())
  for _ in range(of.groups):
    for name, (low, high) in of.intervals.items():
      here = [
        min(max(float(f'{low + (high - low) * next(values):.4g}'), low), high)
        for _ in range(of.count(name))
      ]
      found[name].append(here if name == 'weights' else here[0])
  return found


def where(of: Space, chosen: Numbers) -> tuple[str, ...]:
  """Rules of `--where` that give each group its numbers, one per group.

  Layer i of L is in group floor(i groups / L). What lies before the layers (the
  embedding) has the numbers of the first group, what lies after (final norm,
  heads) those of the last.
  """
  out = []
  for group in range(of.groups):
    layers = f'layer_({"|".join(map(str, of.part(group)))})/.*'
    regex = layers if group else f'embed.*|{layers}'
    if group == of.groups - 1:
      regex = '.*'  # the rules before have taken the rest
    said = ','.join(f'{name}={_text(v[group])}' for name, v in chosen.items())
    out.append(f'{regex}:{said}')
  return tuple(out)


def _text(value: float | list[float]) -> str:
  if isinstance(value, list):
    return f'[{",".join(map(repr, value))}]'
  return repr(value)


def proposals(
  of: Space, *, population: int, seed: int
) -> Generator[Numbers, float | None, None]:
  """A coroutine: yields numbers, is sent their objective, more is better.

  None stands for numbers that cannot be used: worse than all others. The first
  proposal is the middle of all intervals; CMA-ES begins around it.

  Raises UserError where cmaes is not installed.
  """
  best = _cma()(
    mean=np.full(of.size, 0.5),
    sigma=SPREAD,
    bounds=np.tile([[0.0, 1.0]], (of.size, 1)),
    seed=seed,
    population_size=population,
  )
  middle: np.ndarray | None = np.full(of.size, 0.5)
  while True:
    told = []
    for _ in range(population):
      point = best.ask() if middle is None else middle
      middle = None
      objective = yield numbers(of, point)
      told.append((point, math.inf if objective is None else -objective))
    best.tell(told)


def check_installed() -> None:
  """Raises UserError where cmaes is not installed."""
  _cma()


def _cma() -> Any:
  try:
    from cmaes import CMA
  except ImportError:
    raise UserError(
      'a search needs the library cmaes, which is not installed: '
      "pip install 'alignjax[search]'"
    ) from None
  return CMA


def run(
  of: Space,
  measure: Callable[[Numbers], dict[str, Any]],
  file: Path,
  *,
  trials: int,
  population: int,
  seed: int,
  step: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
  """All trials, in order; those in the file are not measured again.

  `measure` gives JSON, with 'objective': a number, or None where the numbers
  cannot be used. `step` is told the trials so far, once for those of the file
  together and then after each.

  Raises UserError if the file holds more trials or those of another search, or
  if the first trial cannot be used: then it is not the numbers' fault.
  """
  proposed = proposals(of, population=population, seed=seed)
  rows: list[dict[str, Any]] = []
  asked = next(proposed)
  for row in recorded(file, trials):
    if row['numbers'] != asked:
      raise UserError(
        f'{file}, trial {row["trial"]}: the optimiser proposes {asked} here, '
        f'not {row["numbers"]}; another version of it, or of NumPy, wrote the '
        'file: search in an empty --workdir'
      )
    rows.append(row)
    asked = proposed.send(row['objective'])
  if rows:
    step(rows)
  while len(rows) < trials:
    row = {'trial': len(rows) + 1, 'numbers': asked, **measure(asked)}
    if not rows and row['objective'] is None:
      raise UserError(
        f'the middle of all intervals cannot be used: {row.get("refused")}'
      )
    _append(file, row)
    rows.append(row)
    step(rows)
    asked = proposed.send(row['objective'])
  return rows


def measured(
  rewards: np.ndarray, kl: np.ndarray, kl_coef: float
) -> dict[str, Any]:
  """A trial of responses with these rewards and KLs, both [P, N].

  The objective is mean reward - kl_coef mean KL, None where that is not finite.
  """
  reward, far = (float(np.mean(x, dtype=np.float64)) for x in (rewards, kl))
  objective = reward - kl_coef * far
  if not math.isfinite(objective):
    why = f'reward {reward} and KL {far} are not both finite'
    return {'objective': None, 'refused': why}
  return {'reward': reward, 'kl': far, 'objective': objective}


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
  """The trial of the highest objective, of equal ones the first."""
  used = [row for row in rows if row['objective'] is not None]
  return max(used, key=lambda row: row['objective'])


def recorded(file: Path, trials: int) -> list[dict[str, Any]]:
  """The finished trials, `trials` at most; what a kill has torn is cut off."""
  rows: list[dict[str, Any]] = []
  for row in metrics.read(file):
    fields = isinstance(row, dict) and {'trial', 'numbers', 'objective'} <= {
      *row
    }
    if not fields or row['trial'] != len(rows) + 1:
      break
    rows.append(row)
  if len(rows) > trials:
    raise UserError(
      f'--trials {trials}: {file} has {len(rows)} already; expected as many or '
      'more'
    )
  if file.exists():
    files.write(file, ''.join(json.dumps(row) + '\n' for row in rows))
  return rows


def _append(file: Path, row: Mapping[str, Any]) -> None:
  """Adds a line and has it on the disk."""
  with open(file, 'a', encoding='utf-8') as out:
    out.write(json.dumps(row) + '\n')
    out.flush()
    os.fsync(out.fileno())
