"""The k-th largest of what is summed over blocks, exactly.

Floats of one sign are in the order of their bits. One pass counts how often
each value of the upper 16 bits occurs, a second counts the lower 16 among the
items that share the upper ones with the item looked for: the counts of a leaf
are the sums of those of its blocks, in whole numbers, so that nothing depends
on how the leaf is cut and nothing of its size is held.

Ties are kept: a selection of k items by `x >= threshold` has more than k where
several items equal the k-th largest (as in bfloat16 they often do), rather than
prefer some for their place.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from jaxtyping import Float, Int

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.method import Pass

_UPPER = 2**15  # the sign bit is 0
_LOWER = 2**16

Values = Callable[[Any, Sequence[Any]], Sequence[Any]]


def share_of(size: int, share: Any) -> int:
  """floor(share * size), of the decimal number that was written.

  In floats, 0.29 of 100 would be 28. Raises UserError for a traced one.
  """
  if not arrays.known(share):
    raise UserError('a share of which items are counted must not be traced')
  return int(Fraction(str(float(share))) * size)


def order_statistics(values: Values) -> tuple[Pass, Pass]:
  """Two passes that leave thresholds, float32 [V, R].

  Args:
    values: (base, leaves) -> V float32 arrays without negative items.

  The method's `prepare` gives the number `ranks`, R whole numbers: threshold
  [v, r] is the ranks[r]-th largest of values v, infinite for rank 0.
  """

  def upper(base: Any, leaves: Sequence[Any], stats: Any) -> Any:
    del stats
    found = [
      arrays.counts(arrays.bits(abs(x)) >> 16, _UPPER)
      for x in values(base, leaves)
    ]
    return arrays.namespace(base).stack(found)

  def lower(base: Any, leaves: Sequence[Any], stats: Any) -> Any:
    xp, found = arrays.namespace(base), []
    for x, places in zip(values(base, leaves), stats[0]):
      whole = arrays.bits(abs(x))
      high, low = whole >> 16, whole & (_LOWER - 1)
      # Items of other bins are counted in one that is not looked at.
      found += [
        arrays.counts(xp.where(high == place, low, _LOWER), _LOWER + 1)[:-1]
        for place in places
      ]
    return xp.stack(found)

  return Pass(upper, _bins), Pass(lower, _thresholds)


def magnitudes(base: Any, leaves: Sequence[Any]) -> list[Any]:
  """|task vector| of each model."""
  return [abs(leaf - base) for leaf in leaves]


def _bins(
  total: Int[Array, 'V bins'], stats: Any, *, ranks: Sequence[int], **numbers
) -> Int[Array, '2 V R']:
  """The bin of every item looked for, and its rank in that bin."""
  del stats, numbers
  xp = arrays.namespace(total)
  found = [_place(counts, rank) for counts in total for rank in ranks]
  shape = (len(total), len(ranks))
  return xp.stack(
    [xp.stack([one[i] for one in found]).reshape(shape) for i in (0, 1)]
  )


def _thresholds(
  total: Int[Array, 'V_R bins'],
  stats: Int[Array, '2 V R'],
  *,
  ranks: Sequence[int],
  **numbers,
) -> Float[Array, 'V R']:
  del numbers
  xp = arrays.namespace(total)
  bins, left = stats
  rows = []
  for v in range(len(bins)):
    row = []
    for r, rank in enumerate(ranks):
      low, _ = _place(total[v * len(ranks) + r], left[v, r])
      whole = (bins[v, r].astype(xp.uint32) << 16) | low.astype(xp.uint32)
      x = arrays.from_bits(xp.stack([whole]))[0]
      row.append(x if rank else xp.float32(xp.inf))
    rows.append(xp.stack(row))
  return xp.stack(rows)


def _place(counts: Int[Array, ' bins'], rank: Any) -> tuple[Any, Any]:
  """(bin of the rank-th largest, rank within that bin), ranks from 1."""
  xp = arrays.namespace(counts)
  above = xp.cumsum(counts[::-1])[::-1]  # items of a bin and of those above it
  place = xp.maximum(xp.sum(above >= rank) - 1, 0)
  return place, rank - (above[place] - counts[place])
