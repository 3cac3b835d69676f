"""Arcee Fusion: only the important changes of one model (arcee.ai).

Importance of an item is its change times how far the softmax of its row, the
weights of one output, has moved.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge import arrays, select
from alignjax.merge.arrays import Array
from alignjax.merge.method import merging


def importance(
  base: Float[Array, '... columns'],
  leaves: Sequence[Float[Array, '... columns']],
) -> list[Float[Array, '... columns']]:
  """|delta| KL(softmax(row of the model) || softmax(row of the base))."""
  xp, (leaf,) = arrays.namespace(base), leaves
  delta = leaf - base
  p = xp.exp(leaf - xp.max(leaf, axis=-1, keepdims=True))
  p = p / xp.sum(p, axis=-1, keepdims=True)
  # With x = delta - E_p[delta], KL = log E_p[exp(-x)] = log(1 + E_p[exp(-x) - 1
  # + x]): no sum of terms that cancel, for it is of the order of delta^2.
  x = delta - xp.sum(p * delta, axis=-1, keepdims=True)
  series = (
    x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x / 720))))
  )
  excess = xp.where(abs(x) < 0.2, series, xp.expm1(-x) + x)
  return [abs(delta) * xp.log1p(xp.sum(p * excess, axis=-1, keepdims=True))]


def prepare(size: int, **numbers) -> dict[str, Any]:
  """Ranks, from the largest, of the quartiles.

  The quantile q is the item at the place floor(q (n - 1)) from the smallest.
  """
  places = [quarter * (size - 1) // 4 for quarter in (1, 2, 3)]
  return {'ranks': tuple(size - place for place in places), **numbers}


@merging(
  'takes the items of one model that are important: change times the KL of the'
  ' softmaxed rows, at or above median + 1.5 IQR',
  models=(1, 1),
  passes=select.order_statistics(importance),
  by_rows=True,
  prepare=prepare,
)
def arcee_fusion(
  base: Float[Array, '... columns'],
  leaves: Sequence[Float[Array, '... columns']],
  *,
  ranks: Sequence[int],
  stats: Float[Array, '1 3'],
) -> Float[Array, '... columns']:
  """The model where its importance is median + 1.5 (Q3 - Q1) or more.

  Args:
    base: the model that is changed.
    leaves: the other model.
    ranks: of the quartiles.
    stats: the quartiles of the importance in the leaf.

  Deviations from mergekit: the quartiles are exact where it samples a million
  items, and nothing is added to the probabilities, where it adds 1e-8.
  """
  del ranks
  low, median, high = stats[0]
  enough = importance(base, leaves)[0] >= median + 1.5 * (high - low)
  return arrays.namespace(base).where(enough, leaves[0], base)
