"""TIES: trim, elect a sign, mean of those that agree (arXiv 2306.01708)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge import arrays, select
from alignjax.merge.arrays import Array
from alignjax.merge.election import elected
from alignjax.merge.method import FACTOR, SHARE, merging


def prepare(size: int, *, density: float = 0.2, **numbers) -> dict[str, Any]:
  """The number of items that stay, as `ranks`."""
  return {'ranks': (select.share_of(size, density),), **numbers}


@merging(
  'trims task vectors to the density largest, elects a sign per item, takes'
  ' the mean of the models that agree',
  numbers={'density': SHARE, 'scale': FACTOR},
  weighted=True,
  passes=select.order_statistics(select.magnitudes),
  prepare=prepare,
)
def ties(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  ranks: Sequence[int],
  stats: Float[Array, 'M 1'],
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """base + scale mean of the trimmed task vectors that agree in sign.

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    ranks: how many items of a leaf stay, floor(density n); density is 0.2 by
      default. Items that equal the last of them in magnitude stay as well.
    stats: the least magnitude that stays, per model.
    weights: in the election and in the mean; 1 by default, not negative.
    scale: lambda in the paper.

  Deviations from the paper: it trims the whole model at once, this each leaf
  for itself, as most implementations do; its models have no weights.
  """
  del ranks
  xp = arrays.namespace(base)
  kept = [
    (size >= least[0]).astype(xp.float32)
    for size, least in zip(select.magnitudes(base, leaves), stats)
  ]
  return elected(base, leaves, kept, weights, scale)
