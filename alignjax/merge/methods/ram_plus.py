"""RAM+ (arXiv 2601.13572): unique changes grow where many are shared.

Means of shared changes are smaller than the changes; what a model lost there,
it gets back where it is alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.election import moved
from alignjax.merge.method import Pass, Range, merging
from alignjax.merge.methods.ram import EPSILON, changed, shares


def bound(base: Any, leaves: Sequence[Any], stats: Any) -> Any:
  """Nothing: measures get no numbers, but what `settle` leaves them."""
  del leaves, stats
  return arrays.namespace(base).zeros(())


def settle_bound(total: Any, stats: Any, *, epsilon: Any, **numbers) -> Any:
  """The bound of what is a change, for `sharing`."""
  del total, stats, numbers
  return epsilon


def sharing(
  base: Any, leaves: Sequence[Any], stats: Any
) -> Float[Array, '2 M']:
  """How many changes of each model are its own, and are shared."""
  xp, changes = arrays.namespace(base), changed(base, leaves, stats)
  count = sum(change.astype(xp.int32) for change in changes)
  return xp.stack(
    [
      xp.stack([xp.sum(change & (count == 1)) for change in changes]),
      xp.stack([xp.sum(change & (count > 1)) for change in changes]),
    ]
  )


def settle(
  total: Any, stats: Any, *, r: Any, alpha: Any, **numbers
) -> Float[Array, ' M']:
  """1 + r min(alpha, shared / unique) of each model.

  The ratio of a model with nothing unique is infinite.
  """
  del stats, numbers
  xp = arrays.namespace(total)
  unique, shared = total
  rho = xp.where(
    unique > 0,
    shared / xp.maximum(unique, 1),
    xp.where(shared > 0, xp.inf, 0),
  )
  return xp.asarray(1 + r * xp.minimum(alpha, rho), dtype=xp.float32)


def prepare(
  size: int,
  *,
  r: Any = 0.1,
  alpha: Any = 0.2,
  epsilon: Any = EPSILON,
  **numbers,
) -> dict[str, Any]:
  """The numbers, with their defaults."""
  del size
  return {'r': r, 'alpha': alpha, 'epsilon': epsilon, **numbers}


@merging(
  'as ram, with the unique changes of a model scaled by 1 + r min(alpha,'
  ' shared/unique), counted in each leaf',
  numbers={
    'r': Range(0, np.inf),
    'alpha': Range(0, np.inf),
    'epsilon': Range(0, np.inf),
  },
  passes=(Pass(bound, settle_bound), Pass(sharing, settle)),
  prepare=prepare,
)
def ram_plus(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, ' M'],
  epsilon: float,
  r: float,
  alpha: float,
) -> Float[Array, '...']:
  """base + stats_m delta_m where only m has changed, else the mean change.

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    stats: the factor of each model's unique changes in the leaf.
    epsilon: what a change is larger than, 1e-5 by default.
    r: how much the factor grows, 0.1 by default. With 0, it is `ram`.
    alpha: the largest ratio of shared to unique that counts, 0.2 by default.

  The counts are those of a leaf, not of the whole model, as in mergekit's
  `ramplus_tl`. They take a reading of the inputs before the merge.
  """
  del r, alpha  # are in the factors
  changes = changed(base, leaves, epsilon)
  return moved(base, leaves, shares(changes, list(stats)))
