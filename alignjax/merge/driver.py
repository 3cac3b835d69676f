"""Merges model directories leaf by leaf, in memory bounded by a known number.

First everything is checked (names, shapes, bases, tokenizers, rules, outputs),
then methods with stats read the inputs once for those, then one pass reads a
leaf of every input, merges it once per output and hands it to the writers.
Arithmetic is float32; the result has the dtypes of the base. Not the place for
a method's formula: those are pure functions in `methods/`.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.core.types import UserError
from alignjax.interop.open import CERTIFICATES, EXTRA
from alignjax.merge import memory, methods
from alignjax.system import model_dir
from alignjax.system.model_dir import ModelDir

Step = Callable[[str], None]  # told 'what happened' after each leaf


class Rule(NamedTuple):
  """Numbers of the leaves whose whole name matches; first match wins."""

  text: str
  pattern: re.Pattern[str]
  numbers: dict[str, float]


class Plan(NamedTuple):
  """A checked merge: nothing in it can be refused any more but weights.

  Attributes:
    method: how.
    base: the base's model directory; its path stands in messages.
    models: what is merged.
    role: which params of theirs.
    leaves: shape and dtype by name.
    extra: those of the base's tensors that are not the decoder's; copied.
    group: layer, tensor or all.
    rules: numbers of some leaves.
    outputs: path -> numbers of that merge.
    overwrite: replace existing outputs.
  """

  method: methods.Method
  base: ModelDir
  models: tuple[ModelDir, ...]
  role: str
  leaves: dict[str, jax.ShapeDtypeStruct]
  extra: dict[str, jax.ShapeDtypeStruct]
  group: str
  rules: tuple[Rule, ...]
  outputs: dict[str, dict[str, Any]]
  overwrite: bool

  @property
  def peak_bytes(self) -> int:
    """Upper estimate of what the arrays of the merge occupy at once."""
    sizes = [
      (math.prod(x.shape), x.dtype.itemsize) for x in self.leaves.values()
    ]
    inputs = len(self.models) + 1
    # Stored and float32 copies of the inputs, and the result.
    leaf = max(n * (inputs * (item + 4) + 4 + item) for n, item in sizes)
    copied = [
      math.prod(x.shape) * x.dtype.itemsize for x in self.extra.values()
    ]
    held, writing = model_dir.writer_bytes(
      [n * item for n, item in sizes] + copied
    )
    # Every writer holds its share; they write one at a time.
    return max([leaf, *copied]) + len(self.outputs) * held + writing

  @property
  def passes(self) -> int:
    return 1 if self.method.stats is None else 2


def plan(
  method: str,
  *,
  base: epath.PathLike,
  models: Sequence[epath.PathLike],
  out: epath.PathLike,
  role: str = 'policy',
  group: str = 'layer',
  where: Sequence[str] = (),
  overwrite: bool = False,
  allow_different_bases: bool = False,
  **numbers: Any,
) -> Plan:
  """Checks a merge before any weight is read. Raises UserError.

  Args:
    method: linear (or lerp), slerp, liti.
    base: model directory that gives the dtypes, the config, the tokenizer and
      the files that go with it, and from which task vectors are taken.
    models: model directories.
    out: the result's; for a list of t or liti_rate the folder of the results,
      `t_0.50` or `liti_0.30`.
    role: which params to merge; beside it the result has `extra` of the base.
    group: layer, tensor or all.
    where: rules 'REGEX:name=value[,name=value]'.
    overwrite: replace existing results.
    allow_different_bases: merge models that record another init than `base`.
    **numbers: of the method; one of them may be a list of several.
  """
  how = methods.method(method)
  methods.group_of('', group)  # refuses an unknown group
  outputs = _outputs(how, out, numbers)
  rules = _rules(where, how, outputs, len(models))
  directories = [model_dir.read(path) for path in (base, *models)]
  first, *others = directories
  _check_kinds(directories)
  leaves = model_dir.leaves(first, role)
  memory.check_same(
    str(first.path),
    leaves,
    {str(model.path): model_dir.leaves(model, role) for model in others},
  )
  _check_tokenizers(directories)
  if not allow_different_bases:
    _check_bases(first, others, role)
  _check_rules(rules, leaves)
  for path in outputs:
    model_dir.check_free(path, overwrite)
  return Plan(
    method=how,
    base=first,
    models=tuple(others),
    role=role,
    leaves=leaves,
    extra=_extra(first, role),
    group=group,
    rules=rules,
    outputs=outputs,
    overwrite=overwrite,
  )


def run(what: Plan, step: Step = lambda text: None) -> list[ModelDir]:
  """Merges; results appear when the pass is complete, none after an error.

  `step` is called after each leaf of each pass.
  """
  stats = _group_stats(what, step)
  with contextlib.ExitStack() as stack:
    puts = [
      stack.enter_context(
        model_dir.writer(
          path,
          config=what.base.config,
          provenance=_provenance(what, numbers, stats),
          files=[f for f in what.base.files if f.name not in CERTIFICATES],
          view=what.base.view,
          head=what.base.head,
          overwrite=what.overwrite,
        )
      )
      for path, numbers in what.outputs.items()
    ]
    for name in what.leaves:
      base, leaves = _read(what, name)
      key = methods.group_of(name, what.group)
      for put, numbers in zip(puts, what.outputs.values()):
        changed = _numbers(what.rules, name, numbers)
        put(
          what.role,
          name,
          _merged(what, name, base, leaves, stats.get(key), changed),
        )
      step(f'merged {name}')
    for name in what.extra:
      leaf = model_dir.load_leaf(what.base, EXTRA, name)
      for put in puts:
        put(EXTRA, name, leaf)
  return [model_dir.read(path) for path in what.outputs]


def _extra(base: ModelDir, role: str) -> dict[str, jax.ShapeDtypeStruct]:
  if EXTRA not in base.roles or role == EXTRA:
    return {}
  return model_dir.leaves(base, EXTRA)


def _merged(what, name, base, leaves, stats, numbers) -> np.ndarray:
  if not memory.is_float(base):
    return memory.same_integers(name, base, leaves)
  return np.asarray(methods.combine(what.method, base, leaves, stats, numbers))


def _read(what: Plan, name: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  base, *leaves = [
    model_dir.load_leaf(model, what.role, name)
    for model in (what.base, *what.models)
  ]
  return base, tuple(leaves)


def _group_stats(what: Plan, step: Step) -> dict[str, Any]:
  """Group -> sum of the stats of its leaves; empty if the method has none."""
  stats: dict[str, Any] = {}
  if what.method.stats is None:
    return stats
  for name, spec in what.leaves.items():
    if memory.is_float(spec):
      part = methods.leaf_stats(what.method, *_read(what, name))
      key = methods.group_of(name, what.group)
      stats[key] = stats[key] + part if key in stats else part
    step(f'measured {name}')
  for key, total in stats.items():
    methods.check_stats(what.method, key, total)
  return stats


def _provenance(
  what: Plan, numbers: Mapping[str, Any], stats: Mapping[str, Any]
) -> dict[str, Any]:
  def source(model: ModelDir):
    digest = model_dir.digest(model, what.role)
    return {'path': str(model.path), 'digest': digest}

  merged: dict[str, Any] = {
    'method': what.method.name,
    'numbers': dict(numbers),
    'group': what.group,
    'where': [rule.text for rule in what.rules],
    'base': source(what.base),
    'models': [source(model) for model in what.models],
  }
  if what.method.report is not None:
    merged['angles_deg'] = {
      key: what.method.report(total) for key, total in stats.items()
    }
  out = {'merge': merged, 'alignjax': _version()}
  if (kept := what.base.provenance.get('source')) is not None:
    out['source'] = kept  # what writes the base's files back writes these
  return out


def _version() -> str:
  try:
    return metadata.version('alignjax')
  except metadata.PackageNotFoundError:  # run from a source tree
    return 'unknown'


def _outputs(
  how: methods.Method, out: epath.PathLike, numbers: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Path of each result -> its numbers."""
  numbers = {k: v for k, v in numbers.items() if v is not None}
  lists = [
    name
    for name, value in numbers.items()
    if name != 'weights' and isinstance(value, list | tuple)
  ]
  if not lists:
    return {str(out): numbers}
  if len(lists) > 1:
    raise UserError(f'only one number may be a list, not {" and ".join(lists)}')
  (name,) = lists
  if not numbers[name]:
    raise UserError(f'{name} is an empty list')
  outputs: dict[str, dict[str, Any]] = {}
  for value in numbers[name]:
    methods.check_share(name, value)
    folder = f'{name.removesuffix("_rate")}_{_label(value)}'
    path = str(epath.Path(out) / folder)
    if path in outputs:
      raise UserError(f'{name} has the value {value} twice')
    outputs[path] = {**numbers, name: value}
  return outputs


def _label(value: float) -> str:
  """Two decimals, or as many as it takes."""
  short = f'{value:.2f}'
  return short if float(short) == value else repr(value)


def _rules(
  where: Sequence[str],
  how: methods.Method,
  outputs: Mapping[str, Mapping[str, Any]],
  models: int,
) -> tuple[Rule, ...]:
  """The rules, once the numbers of every leaf of every result are good."""
  rules = tuple(map(_rule, where))
  for given in outputs.values():
    for changed in ({}, *(rule.numbers for rule in rules)):
      methods.check_numbers(how, {**given, **changed}, models)
  return rules


def _rule(text: str) -> Rule:
  """'REGEX:name=value[,name=value]'; the last colon separates."""
  regex, colon, assignments = text.rpartition(':')
  numbers = {}
  for assignment in assignments.split(','):
    name, equals, value = assignment.partition('=')
    try:
      numbers[name.strip()] = float(value)
    except ValueError:
      equals = ''
    if not (colon and equals):
      raise UserError(
        f'--where {text!r} is not of the form REGEX:name=value[,name=value]'
      )
  try:
    return Rule(text, re.compile(regex), numbers)
  except re.error as error:
    raise UserError(f'--where {text!r}: bad regex: {error}') from error


def _numbers(
  rules: Sequence[Rule], leaf: str, numbers: Mapping[str, Any]
) -> dict[str, Any]:
  rule = _first_match(rules, leaf)
  return {**numbers, **(rule.numbers if rule else {})}


def _first_match(rules: Sequence[Rule], leaf: str) -> Rule | None:
  return next((rule for rule in rules if rule.pattern.fullmatch(leaf)), None)


def _check_rules(rules: Sequence[Rule], leaves: Mapping[str, Any]) -> None:
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


def _check_kinds(directories: Sequence[ModelDir]) -> None:
  base, *others = directories
  if mixed := [str(d.path) for d in directories if d.view == 'conditioned']:
    raise UserError(
      f'merge of a conditioned model: {mixed[0]}; write a plain one first, '
      'aj.save(aj.load(PATH, weights=...), OUT)'
    )
  for model in others:
    for field in ('view', 'head'):
      ours, theirs = getattr(base, field), getattr(model, field)
      if ours != theirs:
        raise UserError(
          f'merge of different kinds of models: {field} is {ours!r} in'
          f' {base.path} and {theirs!r} in {model.path}'
        )


def _check_tokenizers(directories: Sequence[ModelDir]) -> None:
  base, *others = directories
  ours = base.tokenizer.read_bytes() if base.tokenizer else None
  for model in others:
    theirs = model.tokenizer.read_bytes() if model.tokenizer else None
    if ours != theirs:
      raise UserError(
        f'merge of models with different tokenizers: {model_dir.TOKENIZER} of'
        f' {base.path} and of {model.path} are not the same bytes'
      )


def _check_bases(base: ModelDir, models: Sequence[ModelDir], role: str) -> None:
  """Models that say what they were trained from must say: from this base."""
  expected = model_dir.digest(base, role)
  for model in models:
    init = model.provenance.get('init')
    found = init.get('checksum') if isinstance(init, dict) else None
    if found is not None and found != expected:
      raise UserError(
        f'merge of models with different bases: {model.path} was trained from'
        f' weights with digest {str(found)[:12]}, the base {base.path} has'
        f' {expected[:12]} (--allow-different-bases merges them all the same)'
      )
