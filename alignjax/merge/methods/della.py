"""DELLA (arXiv 2406.11617): dropped at random, small items more often.

MAGPRUNE ranks the items of a task vector by magnitude within each row, the
weights of one output; the probability to stay rises with the rank. What stays
is divided by its own probability, so that the expectation is the task vector.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.election import added, elected
from alignjax.merge.method import COUNT, FACTOR, SHARE, merging


def _prepare(
  size: int, *, density: Any = 0.5, epsilon: Any = 0.1, **numbers
) -> dict[str, Any]:
  """The numbers, with their defaults. Raises UserError if p is no share."""
  del size
  if arrays.known(density) and arrays.known(epsilon):
    if epsilon > min(density, 1 - density) + 1e-9:
      raise UserError(
        f'density - epsilon and density + epsilon must lie from 0 to 1, found'
        f' density {density} and epsilon {epsilon}'
      )
  return {'density': density, 'epsilon': epsilon, **numbers}


_FACTS: dict[str, Any] = {
  'numbers': {
    'density': SHARE,
    'epsilon': SHARE,
    'scale': FACTOR,
    'seed': COUNT,
  },
  'weighted': True,
  'random': True,
  'by_rows': True,
  'prepare': _prepare,
}


@merging(
  'drops items at random, small ones of a row more often (density -+ epsilon'
  ' stay), rescales the rest, adds them up',
  **_FACTS,
)
def linear(
  base: Float[Array, '... columns'],
  leaves: Sequence[Float[Array, '... columns']],
  *,
  uniform: Callable[[int], Float[Array, '... columns']],
  density: float,
  epsilon: float,
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '... columns']:
  """base + scale sum_m w_m [u_m < p_m] / p_m (leaf_m - base).

  p = density + epsilon (2 rank / (columns - 1) - 1), with the ranks 0, 1, ...
  of |leaf - base| in its row; items of one magnitude are ranked by their place.
  A row of one item has p = density.

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    uniform: u_m, drawn in [0, 1) for every item; the number `seed` is in it.
    density: mean probability to stay, 0.5 by default: 1 - p in the paper.
    epsilon: how far the ends lie from it, 0.1 by default. With 0, it is DARE.
    weights: one per model, 1 by default, not normalised.
    scale: of the sum, lambda in the paper.

  epsilon is half the width of the range of p, and the range is centred, so that
  density is the mean. mergekit has the same range but does not divide by the p
  of each item: it leaves what stays as it is, or scales the whole tensor to a
  norm that it had before.
  """
  factors = _factors(base, leaves, uniform, density, epsilon)
  return added(base, leaves, factors, weights, scale)


@merging(
  'as della.linear, with the sign elected and the mean as in ties', **_FACTS
)
def ties(
  base: Float[Array, '... columns'],
  leaves: Sequence[Float[Array, '... columns']],
  *,
  uniform: Callable[[int], Float[Array, '... columns']],
  density: float,
  epsilon: float,
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '... columns']:
  """What `linear` leaves, put together as `election.elected` says."""
  factors = _factors(base, leaves, uniform, density, epsilon)
  return elected(base, leaves, factors, weights, scale)


def _factors(
  base: Any, leaves: Any, uniform: Any, density: Any, epsilon: Any
) -> list[Any]:
  """1/p where an item stays, 0 elsewhere."""
  xp, found = arrays.namespace(base), []
  density = xp.asarray(density, dtype=xp.float32)
  epsilon = xp.asarray(epsilon, dtype=xp.float32)
  columns = base.shape[-1]
  for m, leaf in enumerate(leaves):
    rank = arrays.ranks(abs(leaf - base))
    tilt = 2 * rank / xp.float32(max(columns - 1, 1)) - 1
    tilt = tilt if columns > 1 else xp.zeros_like(tilt)
    share = density + epsilon * tilt
    safe = xp.where(share > 0, share, 1)
    found.append(xp.where(uniform(m) < share, 1 / safe, xp.float32(0)))
  return found
