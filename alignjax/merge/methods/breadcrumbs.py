"""Model Breadcrumbs (arXiv 2312.06795): neither outliers nor small changes."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge import arrays, select
from alignjax.merge.arrays import Array
from alignjax.merge.election import added, elected
from alignjax.merge.method import FACTOR, SHARE, merging


def _prepare(
  size: int, *, density: float = 0.9, gamma: float = 0.01, **numbers
) -> dict[str, Any]:
  """Ranks of the first and the last item that stay."""
  keep = select.share_of(size, density)
  drop = min(select.share_of(size, gamma), size - keep)
  return {'ranks': (drop + 1, drop + keep) if keep else (0, 0), **numbers}


_FACTS: dict[str, Any] = {
  'numbers': {'density': SHARE, 'gamma': SHARE, 'scale': FACTOR},
  'weighted': True,
  'passes': select.order_statistics(select.magnitudes),
  'prepare': _prepare,
}


@merging(
  'drops the gamma largest of each task vector, then the smallest until density'
  ' remains; the sum of the rest',
  **_FACTS,
)
def linear(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  ranks: Sequence[int],
  stats: Float[Array, 'M 2'],
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """base + scale sum_m w_m mask_m (leaf_m - base).

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    ranks: of magnitude, of the first and the last item that stay: floor(gamma
      n) + 1, and floor(density n) - 1 more. The defaults are 0.01 and 0.9.
      Where density and gamma exceed 1 together, fewer outliers are dropped, so
      that density 1 drops nothing.
    stats: the magnitudes at these ranks; items that equal one of them stay.
    weights: one per model, 1 by default.
    scale: of the sum, alpha in the paper.
  """
  return added(base, leaves, _kept(base, leaves, stats, ranks), weights, scale)


@merging(
  'as breadcrumbs.linear, with the sign elected and the mean as in ties',
  **_FACTS,
)
def ties(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  ranks: Sequence[int],
  stats: Float[Array, 'M 2'],
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """The masks of `linear`, put together as `election.elected` says.

  Not in the paper, which adds up; the name is that of other tools.
  """
  kept = _kept(base, leaves, stats, ranks)
  return elected(base, leaves, kept, weights, scale)


def _kept(base: Any, leaves: Any, stats: Any, ranks: Any) -> list[Any]:
  xp = arrays.namespace(base)
  return [
    ((size <= ends[0]) & (size >= ends[1]) & bool(ranks[1])).astype(xp.float32)
    for size, ends in zip(select.magnitudes(base, leaves), stats)
  ]
