"""Merges models on disk, in memory bounded by a number known before.

Does what a checked `Plan` says. Methods whose totals belong to groups of leaves
read the inputs once for those; then one pass takes a leaf of every input,
merges it once per output on every core and hands it to the writers, which write
behind. Arithmetic is float32; a result has the dtypes and the format of the
base. Not the place for a method's formula: those are in `methods/`.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from alignjax.core.errors import UserError
from alignjax.core.journal import Put
from alignjax.core.spec import Spec
from alignjax.interop import convert
from alignjax.merge import arrays, blocks, inputs, made, method, rules
from alignjax.merge.planning import Plan

Step = Callable[[str], None]  # told 'what happened' after each leaf


def run(what: Plan, step: Step = lambda text: None) -> list[epath.Path]:
  """Merges; results appear when the pass is complete, none after an error.

  After an interruption or a kill the same merge goes on with the leaves that
  are not finished. `step` is called after each leaf of each pass.
  """
  blocks.keep_freed_memory()
  with contextlib.ExitStack() as stack:
    pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))
    scratch = _scratch(what.outputs[0].path)
    totals = _totals(what, what.leaves, scratch, pool, step)
    for key, total in totals.items():
      method.check_total(what.method, key, total)
    puts = []
    for output, numbers in zip(what.outputs, what.numbers):
      record = {**output.provenance, **_provenance(what, numbers, totals)}
      output = output._replace(provenance=record)
      task = _task(what, record)
      puts.append(stack.enter_context(convert.writer(output, task)))
    behind = stack.enter_context(_behind())
    for name, spec in what.leaves.items():
      left = {i: p for i, p in enumerate(puts) if name not in p.finished}
      found = _merged(what, left, name, spec, totals, scratch, pool)
      for i, array in zip(left, found):
        array = convert.cast(array, what.outputs[i].leaves[name])
        behind(puts[i], name, array)
      step(f'merged {name}' if left else f'found {name}')
    for name in what.base.extra:
      leaf = what.base.load_extra(name)
      for put, output in zip(puts, what.outputs):
        if name in output.extra and name not in put.finished:
          behind(put, name, leaf)
  return [output.path for output in what.outputs]


def seconds(what: Plan) -> float:
  """About how long `run` reads and merges: one leaf is tried, for all of them.

  The result is thrown away; how long it takes to write is not in it.
  """
  sizes = {
    name: convert.size(spec)
    for name, spec in what.leaves.items()
    if arrays.floating(spec.dtype)
  }
  small = [name for name in sizes if sizes[name] <= inputs.HELD_BYTES]
  tried = max(small or sizes, key=lambda name: sizes[name])
  blocks.keep_freed_memory()
  nowhere = {i: Put(lambda *named: None) for i in range(len(what.outputs))}
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    begun = time.perf_counter()
    totals = _totals(what, [tried], '', pool, lambda text: None)
    spec = what.leaves[tried]
    _merged(what, nowhere, tried, spec, totals, '', pool)
    spent = time.perf_counter() - begun
  return spent * sum(sizes.values()) / sizes[tried]


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
  first = found[0]

  readers = [inputs.reader(x) for x in found]

  def cut(x: np.ndarray, rows: Any, start: int, stop: int) -> np.ndarray:
    if len(x) >= stop:
      return rows(start, stop)
    return np.concatenate([x[start:], first[max(start, len(x)) : stop]])

  def read(start: int, stop: int) -> list[np.ndarray]:
    base, *rest = (cut(x, of, start, stop) for x, of in zip(found, readers))
    return [base, *rest] if whole else [base, base, *rest]

  rows, columns = first.shape
  return blocks.Leaf(name, rows, columns, read)


def _totals(
  what: Plan,
  names: Iterable[str],
  scratch: epath.PathLike,
  pool: ThreadPoolExecutor,
  step: Step,
) -> dict[str, Any]:
  """Group -> total over these leaves; empty if groups mean nothing."""
  found: dict[str, Any] = {}
  if not what.method.grouped:
    return found
  for name in names:
    if arrays.floating(what.leaves[name].dtype):
      leaf = _leaf(what, name, scratch)
      part = blocks.total(what.method, 0, leaf, None, pool)
      key = method.group_of(name, what.group)
      found[key] = found[key] + part if key in found else part
    step(f'measured {name}')
  return found


def _merged(
  what: Plan,
  left: Mapping[int, Put],
  name: str,
  spec: Spec,
  totals: Mapping[str, Any],
  scratch: epath.PathLike,
  pool: ThreadPoolExecutor,
) -> list[np.ndarray]:
  """The leaf of these outputs, in their dtypes."""
  if not left:
    return []
  if not arrays.floating(spec.dtype):
    return [_same(what, name)] * len(left)
  leaf = _leaf(what, name, scratch)
  total = totals.get(method.group_of(name, what.group))
  settings = [
    blocks.settled(
      what.method,
      leaf,
      rules.numbers(what.rules, name, what.numbers[i], what.base.config.layers),
      total,
      pool,
    )
    for i in left
  ]
  results = [_result(what, i, put, leaf, scratch) for i, put in left.items()]

  def fill(block: tuple[int, int]) -> None:
    dtypes = [result.matrix.dtype for result in results]
    found = blocks.merged(what.method, leaf, settings, block, dtypes)
    for result, x in zip(results, found):
      result.fill(block, x)

  for _ in blocks.in_order(pool, fill, leaf.blocks(what.method)):
    pass
  matrices = [result.matrix for result in results]
  shape = what.leaves[name].shape
  if not what.turned:
    return [x.reshape(shape) for x in matrices]
  return [inputs.stored_again(name, x, shape) for x in matrices]


class _Result(NamedTuple):
  """A leaf that is being merged.

  Attributes:
    matrix: all of it, in memory or in a file.
    write: (x, byte) -> None of the file where its rows lie one by one: faster
      than by way of the matrix, whose pages would first be filled with zeros.
  """

  matrix: np.ndarray
  write: Callable[[np.ndarray, int], None] | None = None

  def fill(self, block: tuple[int, int], x: np.ndarray) -> None:
    """Puts these rows in their place."""
    if self.write is None:
      self.matrix[slice(*block)] = x
    else:
      self.write(x, block[0] * self.matrix[0].nbytes)


def _result(
  what: Plan,
  which: int,
  put: Put,
  leaf: blocks.Leaf,
  scratch: epath.PathLike,
) -> _Result:
  """Where a leaf is merged to: the file where it will lie, if there is one."""
  spec = what.outputs[which].leaves[leaf.name]
  same = what.turned and spec.shape == what.leaves[leaf.name].shape
  room = put.room(leaf.name) if same else None
  if room is None:
    shape = leaf.rows, leaf.columns
    return _Result(inputs.empty(shape, spec.dtype, scratch))
  matrix = inputs.as_matrix(leaf.name, room.array, True)
  assert inputs.on_file(matrix)  # a view, whatever the format's layout
  first = matrix.ctypes.data == room.array.ctypes.data
  in_order = first and matrix.flags.c_contiguous
  return _Result(matrix, room.write if in_order else None)


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
  one = made.Merge(
    *(what.method, what.base, what.models, what.role, what.group, what.rules),
    numbers=dict(numbers),
    options=what.options,
  )
  merged = made.record(one, lambda model: what.digests.get(str(model.path)))
  if what.method.report is not None:
    for key, total in totals.items():
      for name, value in what.method.report(total).items():
        merged.setdefault(name, {})[key] = value
  return {'merge': merged, 'alignjax': _version()}


def _task(what: Plan, record: Mapping[str, Any]) -> str:
  """Names a result: the same merge of inputs whose files are the same."""
  files = [
    (str(file), stat.length, stat.mtime)
    for model in made.on_disk((what.base, *what.models))
    for file in sorted(model.path.iterdir())
    if not file.is_dir() and (stat := file.stat())
  ]
  text = json.dumps([record, files], sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


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
