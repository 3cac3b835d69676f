"""Numbers of some leaves: 'REGEX:name=value[,name=value]'.

The last colon that assigns separates; a rule is for the leaves whose whole name
matches, the first that matches wins, and one that matches nothing is an error.
A value is a number, or numbers at equal distances over the depth of the model,
'[0,0.5,1]', between which the layers' values lie on straight lines. The list of
`weights` is another: one weight per model, in all leaves of the rule.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.errors import UserError
from alignjax.merge import method
from alignjax.merge.method import Method

_FORM = re.compile(r'(?P<regex>.+):(?P<all>[a-z_]+=[^:]*)')
_ASSIGNMENT = re.compile(r'\s*([a-z_]+)\s*=\s*(\[[^\]]*\]|[^,\[\]]+)\s*(?:,|$)')


class Rule(NamedTuple):
  """Numbers of the leaves whose whole name matches."""

  text: str
  pattern: re.Pattern[str]
  numbers: dict[str, float | tuple[float, ...] | list[float]]


def parsed(
  where: Sequence[str],
  how: Method,
  outputs: Sequence[Mapping[str, Any]],
  models: int,
  extrapolate: bool = False,
) -> tuple[Rule, ...]:
  """The rules, once the numbers of every leaf of every result are good."""
  found = tuple(map(_rule, where))
  for given in outputs:
    method.check_numbers(how, given, models, extrapolate)
    for rule in found:
      for changed in _each(rule.numbers):
        method.check_numbers(how, {**given, **changed}, models, extrapolate)
  return found


def check(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> None:
  """Raises UserError for a rule without leaves."""
  used = [_first_match(rules, leaf) for leaf in leaves]
  for rule in rules:
    if rule in used:
      continue
    if any(rule.pattern.fullmatch(leaf) for leaf in leaves):
      raise UserError(
        f'--where {rule.text!r}: earlier rules take all its leaves'
      )
    raise UserError(
      f'--where {rule.text!r} matches no leaf; the regex must match a whole'
      f' name such as {next(iter(leaves))!r}'
    )


def numbers(
  rules: Sequence[Rule], leaf: str, given: Mapping[str, Any], layers: int
) -> dict[str, Any]:
  """The numbers of a leaf of a model of so many layers."""
  rule = _first_match(rules, leaf)
  if rule is None:
    return dict(given)
  changed = {
    name: _at(value, leaf, layers) if isinstance(value, tuple) else value
    for name, value in rule.numbers.items()
  }
  return {**given, **changed}


def depth(leaves: Iterable[str]) -> int:
  """How many layers a model with leaves of these names has."""
  found = (re.search(r'layer_(\d+)/', leaf) for leaf in leaves)
  return 1 + max((int(place[1]) for place in found if place), default=-1)


def _at(values: Sequence[float], leaf: str, layers: int) -> float:
  """Values over the depth; what lies before and after has the ends."""
  place = re.search(r'layer_(\d+)/', leaf)
  if place is None:
    return values[0] if leaf.startswith('embed') else values[-1]
  depth = int(place[1]) / max(1, layers - 1)
  return float(np.interp(depth, np.linspace(0, 1, len(values)), values))


def _each(numbers: Mapping[str, Any]):
  """The numbers, once for every value of the longest list."""
  count = max(
    [len(v) for v in numbers.values() if isinstance(v, tuple)], default=1
  )
  for i in range(count):
    yield {
      name: value[min(i, len(value) - 1)] if isinstance(value, tuple) else value
      for name, value in numbers.items()
    }


def _rule(text: str) -> Rule:
  form = _FORM.fullmatch(text)
  found: dict[str, float | tuple[float, ...] | list[float]] = {}
  end = 0
  if form is not None:
    while match := _ASSIGNMENT.match(form['all'], end):
      end = match.end()
      try:
        found[match[1]] = _value(match[1], match[2])
      except ValueError:
        found = {}
        break
  if form is None or not found or end < len(form['all']):
    raise UserError(
      f'--where {text!r} is not of the form REGEX:name=value[,name=value]'
    )
  try:
    return Rule(text, re.compile(form['regex']), found)
  except re.error as error:
    raise UserError(f'--where {text!r}: bad regex: {error}') from error


def _value(name: str, text: str) -> float | tuple[float, ...] | list[float]:
  if not text.startswith('['):
    return float(text)
  values = [float(part) for part in text[1:-1].split(',')]
  if name == 'weights':
    return values
  return tuple(values) if len(values) > 1 else values[0]


def _first_match(rules: Sequence[Rule], leaf: str) -> Rule | None:
  return next((rule for rule in rules if rule.pattern.fullmatch(leaf)), None)
