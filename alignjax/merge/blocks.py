"""One leaf merged by NumPy, block by block; the same for disk and memory.

Blocks are whole rows, small enough for a core's cache: what is held does not
grow with the leaf, and cores share the work. What is summed over blocks is
summed in float64 and in order, so that a merge is the same, bit for bit,
however many cores there are and wherever its weights lie.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from alignjax.core.types import UserError
from alignjax.merge import arrays, method
from alignjax.merge.method import Method

ITEMS = 2**17  # of a block, unless a row is longer

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

  def blocks(self) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows, together all of them."""
    step = max(1, ITEMS // max(1, self.columns))
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
      if len(waiting) >= 8:
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
  """What pass `which` measures of the leaf, summed over its blocks."""

  def measured(block: tuple[int, int]) -> Any:
    base, *models = map(arrays.float32, leaf.read(*block))
    return how.passes[which].measure(base, tuple(models), stats)

  found: Any = None
  for part in in_order(pool, measured, leaf.blocks()):
    found = part if found is None else found + part
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
  stats: Any,
  numbers: Mapping[str, Any],
  block: tuple[int, int],
) -> np.ndarray:
  """float32 rows of the merge. Raises UserError for non-finite inputs."""
  read = leaf.read(*block)
  base, *models = map(arrays.float32, read)
  index = None
  if how.random:
    start = block[0] * leaf.columns
    if leaf.size > 2**32:
      raise UserError(f'{leaf.name} has more than 2^32 items')
    index = np.arange(start, start + base.size, dtype=np.uint32)
    index = index.reshape(base.shape)
  return method.combine(
    how, base, models, stats, numbers, name=leaf.name, index=index
  )


def finite(x: np.ndarray) -> bool:
  """Whether no item is NaN or infinite; one fast look in most cases."""
  flat = x.reshape(-1)
  return bool(np.isfinite(np.dot(flat, flat)) or np.isfinite(flat).all())


def matrix(shape: Sequence[int]) -> tuple[int, int]:
  """(rows, columns) of an array as it lies; one row if it has one axis."""
  if len(shape) < 2:
    return 1, math.prod(shape)
  return math.prod(shape[:-1]), shape[-1]


def _told(numbers: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in numbers.items() if k != 'seed'}
