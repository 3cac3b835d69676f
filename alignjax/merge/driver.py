"""Merges models on disk, in memory bounded by a number known before.

First everything is checked (names, shapes, bases, tokenizers, rules, outputs).
Methods whose totals belong to groups of leaves read the inputs once for those;
then one pass takes a leaf of every input, merges it once per output on every
core and hands it to the writers, which write behind. Arithmetic is float32; a
result has the dtypes and the format of the base. Not the place for a method's
formula: those are pure functions in `methods/`.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from alignjax.core.types import UserError
from alignjax.interop import convert
from alignjax.interop.open import absolute
from alignjax.interop.opened import Opened
from alignjax.merge import arrays, blocks, inputs, method, rules
from alignjax.merge.method import Method
from alignjax.system import leaf_files, model_dir

Step = Callable[[str], None]  # told 'what happened' after each leaf


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

  @property
  def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
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
      if model.format == 'alignjax':
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
      convert.size(spec) for m in self.read for spec in m.leaves.values()
    )


def plan(
  name: str,
  *,
  base: epath.PathLike | None,
  models: Sequence[epath.PathLike],
  out: epath.PathLike,
  role: str = 'policy',
  group: str = 'layer',
  where: Sequence[str] = (),
  format: str | None = None,  # noqa: A002
  dtype: str = 'keep',
  pad: bool = False,
  overwrite: bool = False,
  allow_different_bases: bool = False,
  extrapolate: bool = False,
  **numbers: Any,
) -> Plan:
  """Checks a merge before any weight is read. Raises UserError.

  Args:
    name: of the method.
    base: model that gives the dtypes, the config, the tokenizer and the files
      that go with it, and from which task vectors are taken; the first model
      where the method has no task vectors and none is given.
    models: model directories of any format.
    out: the result's; for a list of values of one number the folder of the
      results, `t_0.50` or `liti_0.30`.
    role: which params to merge; beside it the result has `extra` of the base.
    group: layer, tensor or all.
    where: rules 'REGEX:name=value[,name=value]'; see `rules`.
    format: of the results: alignjax, hf or deepmind; the base's by default.
    dtype: keep (the base's), bfloat16 or float32.
    pad: tables of other rows than the base's lose what is too much and take
      what is missing from the base.
    overwrite: replace existing results.
    allow_different_bases: merge models that record another init than `base`.
    extrapolate: numbers that interpolate may lie beyond their ends.
    **numbers: of the method; one of them may be a list of several.
  """
  how = method.method(name)
  method.group_of('', group)  # refuses an unknown group
  if base is None:
    if how.uses_base:
      raise UserError(f'{name} needs --base, from which the task vectors are')
    base = models[0]
  wanted = _outputs(how, out, numbers)
  given = rules.parsed(
    where, how, tuple(wanted.values()), len(models), extrapolate
  )
  first, *others = inputs.opened((base, *models), role, pad=pad)
  if dtype == 'keep' and (wrong := inputs.mixed_dtypes((first, *others))):
    more = f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''
    raise UserError(
      f'merge of models of different dtypes: {"; ".join(wrong[:5])}{more};'
      ' say with --dtype which the result has'
    )
  if not allow_different_bases:
    inputs.check_bases(first, others, role)
  rules.check(given, first.leaves)
  for path in wanted:
    _check_apart(path, (first, *others))
  outputs = tuple(
    convert.plan(
      _told(first, role),
      path,
      to=format or first.format,
      dtype=dtype,
      overwrite=overwrite,
      role=role,
    )
    for path in wanted
  )
  return Plan(
    method=how,
    base=first,
    models=tuple(others),
    role=role,
    group=group,
    rules=given,
    numbers=tuple(wanted.values()),
    outputs=outputs,
    turned=how.by_rows or first.format == 'hf',
  )


def run(what: Plan, step: Step = lambda text: None) -> list[epath.Path]:
  """Merges; results appear when the pass is complete, none after an error.

  `step` is called after each leaf of each pass.
  """
  blocks.keep_freed_memory()
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
    scratch = _scratch(what.outputs[0].path)
    totals = _totals(what, scratch, pool, step)
    puts = []
    for output, numbers in zip(what.outputs, what.numbers):
      record = {**output.provenance, **_provenance(what, numbers, totals)}
      output = output._replace(provenance=record)
      puts.append(stack.enter_context(convert.writer(output)))
    behind = stack.enter_context(_behind())
    for name, spec in what.leaves.items():
      found = _merged(what, name, spec, totals, scratch, pool)
      for put, output, array in zip(puts, what.outputs, found):
        behind(put, name, convert.cast(array, output.leaves[name]))
      step(f'merged {name}')
    for name in what.base.extra:
      leaf = what.base.load_extra(name)
      for put, output in zip(puts, what.outputs):
        if name in output.extra:
          behind(put, name, leaf)
  return [output.path for output in what.outputs]


@contextlib.contextmanager
def _behind() -> Iterator[Callable[..., None]]:
  """Calls in the background, in order, two at most waiting."""
  waiting: list[Future[Any]] = []
  with ThreadPoolExecutor(1) as pool:

    def later(fn: Callable[..., Any], *args: Any) -> None:
      while len(waiting) >= 2:
        waiting.pop(0).result()
      waiting.append(pool.submit(fn, *args))

    yield later
    for future in waiting:
      future.result()


def _leaf(what: Plan, name: str, scratch: epath.PathLike) -> blocks.Leaf:
  # The base's rows stand for those that another table lacks.
  shapes = {m.leaves[name].shape for m in (what.base, *what.models)}
  whole = what.method.uses_base or len(shapes) > 1
  models = (what.base, *what.models) if whole else what.models
  found = inputs.matrices(models, name, what.turned, scratch)
  first, others = found[0], found[1:] if whole else found

  def cut(x: np.ndarray, start: int, stop: int) -> np.ndarray:
    if len(x) >= stop:
      return x[start:stop]
    return np.concatenate([x[start:], first[max(start, len(x)) : stop]])

  def read(start: int, stop: int) -> list[np.ndarray]:
    return [cut(x, start, stop) for x in (first, *others)]

  rows, columns = first.shape
  return blocks.Leaf(name, rows, columns, read)


def _totals(
  what: Plan, scratch: epath.PathLike, pool: ThreadPoolExecutor, step: Step
) -> dict[str, Any]:
  """Group -> total of the first pass; empty if groups mean nothing to it."""
  found: dict[str, Any] = {}
  if not what.method.grouped:
    return found
  for name, spec in what.leaves.items():
    if arrays.floating(spec.dtype):
      leaf = _leaf(what, name, scratch)
      part = blocks.total(what.method, 0, leaf, None, pool)
      key = method.group_of(name, what.group)
      found[key] = found[key] + part if key in found else part
    step(f'measured {name}')
  for key, total in found.items():
    method.check_total(what.method, key, total)
  return found


def _merged(
  what: Plan,
  name: str,
  spec: jax.ShapeDtypeStruct,
  totals: Mapping[str, Any],
  scratch: epath.PathLike,
  pool: ThreadPoolExecutor,
) -> list[np.ndarray]:
  """The leaf of every output, in its dtype."""
  if not arrays.floating(spec.dtype):
    return [_same(what, name)] * len(what.outputs)
  leaf = _leaf(what, name, scratch)
  total = totals.get(method.group_of(name, what.group))
  settings = [
    blocks.settled(
      what.method,
      leaf,
      rules.numbers(what.rules, name, numbers, what.base.config.layers),
      total,
      pool,
    )
    for numbers in what.numbers
  ]
  results = [
    inputs.empty((leaf.rows, leaf.columns), output.leaves[name].dtype, scratch)
    for output in what.outputs
  ]

  def fill(block: tuple[int, int]) -> None:
    found = blocks.merged(what.method, leaf, settings, block)
    for result, x in zip(results, found):
      result[slice(*block)] = arrays.rounded(x, result.dtype)

  for _ in blocks.in_order(pool, fill, leaf.blocks()):
    pass
  shape = what.leaves[name].shape
  if not what.turned:
    return [x.reshape(shape) for x in results]
  return [inputs.stored_again(name, x, shape) for x in results]


def _same(what: Plan, name: str) -> np.ndarray:
  """A leaf of whole numbers, which must agree: they have no mean."""
  first, *others = (model.load(name) for model in (what.base, *what.models))
  if not all(np.array_equal(first, x) for x in others):
    raise UserError(
      f'leaf {name!r} is {first.dtype} and differs between models'
    )
  return first


def _provenance(
  what: Plan, numbers: Mapping[str, Any], totals: Mapping[str, Any]
) -> dict[str, Any]:
  def source(model: Opened) -> dict[str, Any]:
    digest = inputs.digest(model, what.role)
    known = {} if digest is None else {'digest': digest}
    return {'path': str(model.path), **known}

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
      key: what.method.report(total) for key, total in totals.items()
    }
  return {'merge': merged, 'alignjax': _version()}


def _told(base: Opened, role: str) -> Opened:
  """The base as what is written: of its past only what writes files back."""
  source = base.provenance.get('source')
  extra = {} if role == 'extra' else base.extra
  return base._replace(
    provenance={} if source is None else {'source': source}, extra=extra
  )


def _version() -> str:
  try:
    return metadata.version('alignjax')
  except metadata.PackageNotFoundError:  # run from a source tree
    return 'unknown'


def _scratch(path: epath.Path) -> str:
  """A local folder on the result's disk, or the system's own."""
  folder = path.parent
  if '://' in str(folder):
    return ''
  folder.mkdir(parents=True, exist_ok=True)
  return str(folder)


def _check_apart(path: str, models: Sequence[Opened]) -> None:
  """Raises UserError if a result would lie inside an input, or over it."""
  result = os.path.realpath(path)
  for model in models:
    given = os.path.realpath(model.path)
    if '://' in path or os.path.commonpath([result, given]) != given:
      continue
    where = 'is an input' if result == given else 'lies inside an input'
    raise UserError(f'{path} {where}: {model.path}')


def _outputs(
  how: Method, out: epath.PathLike, numbers: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Path of each result -> its numbers."""
  numbers = {k: v for k, v in numbers.items() if v is not None}
  lists = [
    name
    for name, value in numbers.items()
    if name != 'weights' and isinstance(value, list | tuple)
  ]
  if not lists:
    return {str(absolute(out)): numbers}
  if len(lists) > 1:
    raise UserError(f'only one number may be a list, not {" and ".join(lists)}')
  (name,) = lists
  if not numbers[name]:
    raise UserError(f'{name} is an empty list')
  outputs: dict[str, dict[str, Any]] = {}
  for value in numbers[name]:
    if not isinstance(value, int | float) or not math.isfinite(value):
      raise UserError(f'{name} must be a list of numbers, found {value!r}')
    folder = f'{name.removesuffix("_rate")}_{_label(value)}'
    path = str(absolute(out) / folder)
    if path in outputs:
      raise UserError(f'{name} has the value {value} twice')
    outputs[path] = {**numbers, name: value}
  return outputs


def _label(value: float) -> str:
  """Two decimals, or as many as it takes."""
  short = f'{value:.2f}'
  return short if float(short) == value else repr(value)
