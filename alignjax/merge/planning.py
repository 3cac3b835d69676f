"""Checks a merge and says what it will take, before any weight is read.

Names, shapes, bases, tokenizers, numbers, rules and outputs are all looked at
here: the driver does what a `Plan` says and refuses nothing but weights.
"""

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.spec import Spec
from alignjax.interop import convert
from alignjax.interop.open import absolute
from alignjax.interop.opened import Opened
from alignjax.merge import blocks, deferred, inputs, made, method, rules
from alignjax.merge.method import Method
from alignjax.system import leaf_files, model_dir


class Plan(NamedTuple):
  """A checked merge: nothing in it can be refused any more but weights.

  Attributes:
    method: how.
    base: what gives config, tokenizer and files, and the task vectors' origin.
    models: what is merged.
    role: which params of theirs.
    group: layer, tensor or all.
    rules: numbers of some leaves.
    numbers: of each output.
    outputs: how each is written.
    turned: leaves are taken with their outputs first.
    options: dtype, pad, extrapolate and checksums as they were given.
    digests: path of an input -> name of its weights, where it is known.
  """

  method: Method
  base: Opened
  models: tuple[Opened, ...]
  role: str
  group: str
  rules: tuple[rules.Rule, ...]
  numbers: tuple[dict[str, Any], ...]
  outputs: tuple[convert.Plan, ...]
  turned: bool
  options: dict[str, Any]
  digests: Mapping[str, str]

  @property
  def leaves(self) -> dict[str, Spec]:
    return self.base.leaves

  @property
  def read(self) -> tuple[Opened, ...]:
    """The inputs whose weights are read; the first stands for the base."""
    if self.method.uses_base:
      return self.base, *self.models
    return self.models

  @property
  def passes(self) -> int:
    """How often the inputs are read, leaf by leaf."""
    return 2 if self.method.grouped else 1

  @property
  def peak_bytes(self) -> int:
    """Upper estimate of what the arrays of the merge occupy at once."""
    sizes = [convert.size(spec) for spec in self.leaves.values()]
    largest = max(sizes)
    held = min(largest, inputs.HELD_BYTES)
    window = blocks.ITEMS * 4 * blocks.WAITING
    total = window * (3 * len(self.read) + 4 * len(self.outputs))
    for model in self.read:
      if model.merge is not None:  # made in memory, a leaf of all at once
        total += (1 + len(made.on_disk([model]))) * largest
      elif model.format == 'alignjax':
        total += held
      elif model.format == 'deepmind':
        total += largest
    if any(model.format == 'alignjax' for model in self.read):
      # A leaf of one chunk is decoded whole, before it is put where it stays.
      total += min(largest, model_dir.PART_BYTES) + leaf_files.PASSING_BYTES
    for output in self.outputs:
      total += 2 * held  # one is filled while the one before is written
      if output.to != 'hf':
        between, writing = model_dir.writer_bytes(
          map(convert.size, (*output.leaves.values(), *output.extra.values()))
        )
        total += between + writing
      if output.to != self.base.format:
        total += largest  # turned around
    return total

  @property
  def read_bytes(self) -> int:
    """What is read from all inputs, in all passes."""
    return self.passes * sum(
      convert.size(spec)
      for m in made.on_disk(self.read)
      for spec in m.leaves.values()
    )


def plan(
  name: str,
  *,
  base: Any,
  models: Sequence[Any],
  out: epath.PathLike,
  role: str = 'policy',
  group: str = 'layer',
  where: Sequence[str] = (),
  format: str | None = None,  # noqa: A002
  overwrite: bool = False,
  allow_different_bases: bool = False,
  dtype: str = 'keep',
  pad: bool = False,
  extrapolate: bool = False,
  checksums: bool = False,
  **numbers: Any,
) -> Plan:
  """The merge by the method `name`. Raises UserError.

  Args:
    name: of the method.
    base: gives dtypes, config, tokenizer and files, and is where task vectors
      begin; the first model for methods without those.
    models: model directories of any format; each, as the base, may be a merge
      that is not written, see `deferred`.
    out: the result's; of lists of numbers the folder of `t_0.50`, `t_0.70`.
    role: which params to merge; beside it the result has `extra` of the base.
    group: layer, tensor or all.
    where: rules 'REGEX:name=value[,name=value]'; see `rules`.
    format: of the results: alignjax, hf or deepmind; the base's by default.
    overwrite: replace existing results.
    allow_different_bases: `base` need not be what the models began from.
    dtype: keep, which is the base's, bfloat16 or float32.
    pad: tables with other rows than the base's are cut, or filled from it.
    extrapolate: numbers that interpolate may lie beyond their ends.
    checksums: inputs of foreign formats are read once more for their digests.
    **numbers: of the method; lists give a result per combination.
  """
  options = dict(
    dtype=dtype, pad=pad, extrapolate=extrapolate, checksums=checksums
  )
  how, wanted = method.checked(name, base, group), _outputs(out, numbers)
  numbers_of = tuple(wanted.values())
  given = rules.parsed(where, how, numbers_of, len(models), extrapolate)
  found = deferred.given((base or models[0], *models))
  first, *others = inputs.fitting(found, role, pad=pad, dtype=dtype)
  rules.check(given, first.leaves)
  return Plan(
    *(how, first, tuple(others), role, group, given, numbers_of),
    outputs=_written(
      wanted, (first, *others), role, format, dtype=dtype, overwrite=overwrite
    ),
    turned=how.by_rows or first.format == 'hf',
    options=options,
    digests=_digests(first, others, role, checksums, allow_different_bases),
  )


def _digests(
  base: Opened,
  models: Sequence[Opened],
  role: str,
  checksums: bool,
  allow_different_bases: bool,
) -> dict[str, str]:
  """Path -> digest of the inputs that have one, once they have one base."""
  found = {
    str(model.path): digest
    for model in made.within((base, *models))
    if (digest := inputs.digest(model, role, checksums)) is not None
  }
  if not allow_different_bases:
    inputs.check_bases(base, models, found.get(str(base.path)))
  return found


def _written(
  wanted: Mapping[str, Any],
  models: Sequence[Opened],
  role: str,
  to: str | None,
  **options: Any,
) -> tuple[convert.Plan, ...]:
  """How each result is written."""
  for path in wanted:
    check_apart(path, models)
  base = _told(models[0], role)
  return tuple(
    convert.plan(base, path, to=to or base.format, role=role, **options)
    for path in wanted
  )


def recorded(path: epath.PathLike) -> dict[str, Any]:
  """Arguments of `plan` that give a merged model again, but for `out`.

  Raises UserError where the model does not say how it was merged, or one that
  it came from, and whose digest it has, holds other weights now.
  """
  model = inputs.opened([path], 'policy')[0]
  said = model.provenance.get('merge')
  if not isinstance(said, dict):
    raise UserError(f'{path} does not say that it was merged, so not from what')
  _check_sources(said)
  kept = 'group where role dtype pad extrapolate checksums'.split()
  return {
    **made.spec(said),
    'format': model.format,
    **{name: said[name] for name in kept},
  }


def _check_sources(said: Mapping[str, Any]) -> None:
  """Raises UserError unless the sources of a record are what they were."""
  for source in (said['base'], *said['models']):
    if 'merge' in source:
      _check_sources(source['merge'])
      continue
    expected = source.get('digest')
    if expected is None:
      continue
    source_model = inputs.opened([source['path']], said['role'])[0]
    found = inputs.digest(source_model, said['role'], foreign=True)
    if found != expected:
      raise UserError(
        f'{source["path"]} has other weights (digest {str(found)[:12]}) than'
        f' those that were merged ({expected[:12]})'
      )


def _told(base: Opened, role: str) -> Opened:
  """The base as what is written: of its past only what writes files back."""
  source = base.provenance.get('source')
  extra = {} if role == 'extra' else base.extra
  return base._replace(
    provenance={} if source is None else {'source': source}, extra=extra
  )


def check_apart(path: epath.PathLike, models: Sequence[Opened]) -> None:
  """Raises UserError if a result would lie inside an input, or over it."""
  result = os.path.realpath(path)
  for model in made.on_disk(models):
    given = os.path.realpath(model.path)
    if '://' in str(path) or os.path.commonpath([result, given]) != given:
      continue
    where = 'is an input' if result == given else 'lies inside an input'
    raise UserError(f'{path} {where}: {model.path}')


def _outputs(
  out: epath.PathLike, numbers: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Path of each result -> its numbers."""
  numbers = {k: v for k, v in numbers.items() if v is not None}
  # In the order of their names: a path must not depend on that of flags.
  lists = sorted(
    name
    for name, value in numbers.items()
    if name != 'weights' and isinstance(value, list | tuple)
  )
  if not lists:
    return {str(absolute(out)): numbers}
  for name in lists:
    _check_list(name, numbers[name])
  outputs: dict[str, dict[str, Any]] = {}
  for values in itertools.product(*(numbers[name] for name in lists)):
    folder = '_'.join(
      f'{name.removesuffix("_rate")}_{_label(value)}'
      for name, value in zip(lists, values)
    )
    outputs[str(absolute(out) / folder)] = {
      **numbers,
      **dict(zip(lists, values)),
    }
  return outputs


def _check_list(name: str, values: Sequence[Any]) -> None:
  if not values:
    raise UserError(f'{name} is an empty list')
  for i, value in enumerate(values):
    if not isinstance(value, int | float) or not math.isfinite(value):
      raise UserError(f'{name} must be a list of numbers, found {value!r}')
    if value in values[:i]:
      raise UserError(f'{name} has the value {value} twice')


def _label(value: float) -> str:
  """Two decimals, or as many as it takes."""
  short = f'{value:.2f}'
  return short if float(short) == value else repr(value)
