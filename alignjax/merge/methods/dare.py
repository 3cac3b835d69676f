"""DARE (arXiv 2311.03099): items of task vectors dropped at random.

What stays is divided by the share that stays, so that the expectation is the
task vector. What is drawn for an item depends on the seed, the leaf's name, the
model's place and the item's index alone, not on how the leaf is cut.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.election import added, elected
from alignjax.merge.method import COUNT, FACTOR, SHARE, merging

_FACTS: dict[str, Any] = {
  'numbers': {'density': SHARE, 'scale': FACTOR, 'seed': COUNT},
  'weighted': True,
  'random': True,
}


@merging(
  'drops items of the task vectors at random but for a share density, rescales'
  ' the rest by 1/density, adds them up',
  **_FACTS,
)
def linear(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  uniform: Callable[[int], Float[Array, '...']],
  weights: Sequence[float] | None = None,
  density: float = 0.5,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """base + scale sum_m w_m [u_m < density] / density (leaf_m - base).

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    uniform: u_m, drawn in [0, 1) for every item of model m; the number `seed`
      (0 by default) is in it.
    weights: one per model, 1 by default, not normalised.
    density: probability to stay, 1 - p in the paper; at 0 the base stays.
    scale: of the sum.
  """
  factors = _factors(len(leaves), uniform, density)
  return added(base, leaves, factors, weights, scale)


@merging(
  'as dare.linear, with the sign elected and the mean as in ties', **_FACTS
)
def ties(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  uniform: Callable[[int], Float[Array, '...']],
  weights: Sequence[float] | None = None,
  density: float = 0.5,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """What `linear` leaves, put together as `election.elected` says.

  Deviations from the paper: it trims by magnitude as well where it merges with
  TIES; this does not, so that density is what stays.
  """
  factors = _factors(len(leaves), uniform, density)
  return elected(base, leaves, factors, weights, scale)


def _factors(models: int, uniform: Any, density: Any) -> list[Any]:
  draws = [uniform(m) for m in range(models)]
  xp = arrays.namespace(draws[0])
  density = xp.asarray(density, dtype=xp.float32)
  factor = 1 / xp.maximum(density, np.float32(1e-30))
  return [xp.where(u < density, factor, xp.float32(0)) for u in draws]
