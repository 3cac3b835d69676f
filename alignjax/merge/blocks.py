"""One leaf merged by NumPy, block by block; the same for disk and memory.

Blocks are whole rows, small enough for a core's cache: what is held does not
grow with the leaf, and cores share the work. What is summed over blocks is
summed in float64 and in order, so that a merge is the same, bit for bit,
however many cores there are and wherever its weights lie.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.errors import UserError
from alignjax.merge import arrays, method
from alignjax.merge.method import Method

ITEMS = 2**18  # of a block, unless a row is longer
WAITING = 8  # blocks at once

Read = Callable[[int, int], Sequence[np.ndarray]]


class Leaf(NamedTuple):
  """A leaf of every input, as matrices of one shape.

  Attributes:
    name: canonical.
    rows: how many.
    columns: items of a row.
    read: (start, stop) -> those rows of the base and of every model, in their
      stored dtypes. Without a base, the first model's stand for it.
  """

  name: str
  rows: int
  columns: int
  read: Read

  @property
  def size(self) -> int:
    return self.rows * self.columns

  def blocks(self, how: Method) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows, together all of them."""
    # What C reads once leaves little in the cache: fewer calls are faster.
    items = 2 * ITEMS if how.as_stored else ITEMS
    step = max(1, items // max(1, self.columns))
    for start in range(0, self.rows, step):
      yield start, min(start + step, self.rows)


def in_order(
  pool: ThreadPoolExecutor | None, fn: Callable[..., Any], items: Iterable[Any]
) -> Iterator[Any]:
  """fn of each item, in order; with a pool a few at once, never all."""
  if pool is None:
    yield from map(fn, items)
    return
  waiting: list[Any] = []
  try:
    for item in items:
      waiting.append(pool.submit(fn, item))
      if len(waiting) >= WAITING:
        yield waiting.pop(0).result()
    while waiting:
      yield waiting.pop(0).result()
  finally:
    for future in waiting:
      future.cancel()


def total(
  how: Method,
  which: int,
  leaf: Leaf,
  stats: Any,
  pool: ThreadPoolExecutor | None = None,
) -> Any:
  """What pass `which` measures of the leaf, summed over its blocks.

  Raises UserError for inputs that are not finite, if the total is a group's.
  """

  def measured(block: tuple[int, int]) -> Any:
    base, *models = _taken(how, leaf.read(*block))
    return how.passes[which].measure(base, tuple(models), stats)

  found: Any = None
  for part in in_order(pool, measured, leaf.blocks(how)):
    found = part if found is None else found + part
  if how.grouped and not np.isfinite(found).all():
    # Squares may overflow where no weight is to blame.
    for block in leaf.blocks(how):
      _check_finite(leaf, block, leaf.read(*block))
  return found


def settled(
  how: Method,
  leaf: Leaf,
  numbers: Mapping[str, Any],
  group_total: Any = None,
  pool: ThreadPoolExecutor | None = None,
) -> tuple[Any, dict[str, Any]]:
  """(stats, numbers) that the method gets for this leaf.

  `group_total` is the total of the first pass over the leaf's group; without
  one the leaf is its own group.
  """
  given = dict(numbers)
  if how.prepare is not None:
    given = how.prepare(leaf.size, **given)
  stats: Any = None
  for which, one in enumerate(how.passes):
    found = group_total if which == 0 else None
    if found is None:
      found = total(how, which, leaf, stats, pool)
    stats = one.settle(found, stats, **_told(given))
  return stats, given


def merged(
  how: Method,
  leaf: Leaf,
  settings: Sequence[tuple[Any, Mapping[str, Any]]],
  block: tuple[int, int],
  dtypes: Sequence[Any],
) -> list[np.ndarray]:
  """Rows of the merge, for each (stats, numbers) of `settled` in its dtype.

  Raises UserError for inputs that are not finite.
  """
  found = leaf.read(*block)
  if not how.grouped:  # else its total has told, over all blocks
    _check_finite(leaf, block, found)
  base, *models = _taken(how, found)
  index = None
  if how.random:
    if leaf.size > 2**32:
      raise UserError(f'leaf {leaf.name!r} has more than 2^32 items')
    start = block[0] * leaf.columns
    index = np.arange(start, start + base.size, dtype=np.uint32)
    index = index.reshape(base.shape)
  results = []
  for (stats, numbers), dtype in zip(settings, dtypes):
    x = method.combine(
      how, base, models, stats, numbers, name=leaf.name, index=index
    )
    results.append(arrays.rounded(x, dtype))
  return results


def _check_finite(
  leaf: Leaf, block: tuple[int, int], found: Sequence[np.ndarray]
) -> None:
  if not all(map(arrays.finite, found)):
    raise UserError(
      f'leaf {leaf.name!r} has NaN or infinite weights in one of the inputs, in'
      f' rows {block[0]} to {block[1] - 1} of {leaf.rows}'
    )


def _taken(how: Method, found: Sequence[np.ndarray]) -> list[np.ndarray]:
  """What was read as the method takes it, each array once."""
  if how.as_stored:
    return list(found)
  known = {id(x): arrays.float32(x) for x in found}
  return [known[id(x)] for x in found]


def same_integers(name: str, base: Any, leaves: Sequence[Any]) -> Any:
  """`base`, if the models agree with it: other numbers have no mean."""
  known = all(map(arrays.known, (base, *leaves)))
  if known and not all(np.array_equal(base, x) for x in leaves):
    raise UserError(f'leaf {name!r} is {base.dtype} and differs between models')
  return base


def keep_freed_memory() -> None:
  """Has the C library hand freed arrays to the next block.

  By default it gives them back to the system, which fills each page with zeros
  again: half of a merge's time. Where the library has no such option, nothing.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError, TypeError):
    return
  for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of glibc
    mallopt(option, 2**30)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
  """(rows, columns) of an array as it lies; one row if it has one axis."""
  if len(shape) < 2:
    return 1, math.prod(shape)
  return math.prod(shape[:-1]), shape[-1]


def _told(numbers: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in numbers.items() if k != 'seed'}
