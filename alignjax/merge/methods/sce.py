"""SCE: select, calculate, erase (FuseChat, arXiv 2408.07990)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float

from alignjax.merge import arrays, select
from alignjax.merge.arrays import Array
from alignjax.merge.election import elected
from alignjax.merge.method import FACTOR, SHARE, Pass, merging


class Stats(NamedTuple):
  """What a leaf's passes leave: the least variance selected, the weights."""

  least: Any
  weights: Any


def variance(
  base: Float[Array, '...'], leaves: Sequence[Float[Array, '...']]
) -> list[Float[Array, '...']]:
  """Of the task vectors, over the models; one array."""
  deltas = [leaf - base for leaf in leaves]
  mean = sum(deltas) / arrays.namespace(base).float32(len(deltas))
  squares = [(delta - mean) ** 2 for delta in deltas]
  return [sum(squares) / arrays.namespace(base).float32(len(deltas))]


def selected(base: Any, leaves: Sequence[Any], least: Any) -> Any:
  """1 for items of which the models differ enough, 0 for others."""
  xp = arrays.namespace(base)
  return (variance(base, leaves)[0] >= least).astype(xp.float32)


def energy(base: Any, leaves: Sequence[Any], stats: Any) -> Any:
  """Sum of squares of what is selected of each task vector."""
  kept = selected(base, leaves, stats[0, 0])
  return arrays.namespace(base).stack(
    [
      arrays.inner(delta, delta)
      for delta in (kept * (leaf - base) for leaf in leaves)
    ]
  )


def settle(total: Any, stats: Any, **numbers) -> Stats:
  """Each model's share of the energy; equal shares where there is none."""
  del numbers
  xp = arrays.namespace(total)
  whole = xp.sum(total)
  shares = xp.where(whole > 0, total / xp.where(whole > 0, whole, 1), 1)
  return Stats(stats[0, 0], shares)


def prepare(size: int, *, density: float = 0.1, **numbers) -> dict[str, Any]:
  """The number of items selected, as `ranks`."""
  return {'ranks': (select.share_of(size, density),), **numbers}


@merging(
  'selects the density items of most variance over the models, weighs models'
  ' by the squares of these, erases minority signs',
  numbers={'density': SHARE, 'scale': FACTOR},
  passes=(*select.order_statistics(variance), Pass(energy, settle)),
  prepare=prepare,
)
def sce(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  ranks: Sequence[int],
  stats: Stats,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """base + the mean of the selected changes whose sign has the majority.

  The weights are the models' shares of the sum of squares of selected changes
  in the leaf; the mean is over the models that agree with the sign of the sum
  of the changes, with these weights.

  Args:
    base: the model that all of them are compared with, the pivot.
    leaves: the models.
    ranks: how many items are selected, floor(density n); density is 0.1 by
      default. Items of the same variance as the last of them are as well.
    stats: of the leaf.
    scale: of the change.

  Deviations from mergekit: it counts density of the items whose variance is not
  0, this of all items, as the paper's top k percent does.
  """
  del ranks
  xp = arrays.namespace(base)
  kept = selected(base, leaves, stats.least)
  # The sign is that of the plain sum; only the mean has the models' weights.
  sign = xp.sign(sum(kept * (leaf - base) for leaf in leaves))
  agree = [kept * (xp.sign(leaf - base) == sign) for leaf in leaves]
  return elected(base, leaves, agree, list(stats.weights), scale)
