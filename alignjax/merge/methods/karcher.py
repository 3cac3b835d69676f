"""The Riemannian (Karcher) mean of the directions of the models themselves.

The mean on the sphere is the point from which the directions, each at its
angle, cancel. It is in their span: what is iterated are M coefficients, and
the M x M inner products of the models are all that is read of the weights.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import full_gram
from alignjax.merge.method import Pass, merging
from alignjax.merge.methods.linear import normalised
from alignjax.merge.sphere import barycentre, length, problem, step

_STEPS = 1000


def coefficients(
  gram: Float[Array, 'M M'],
  stats: Any = None,
  *,
  weights: Sequence[float] | None = None,
) -> Float[Array, ' M']:
  """Weight of each model: that of the mean direction times the mean norm."""
  del stats
  shares = normalised(weights, len(gram))
  point, there, cosines, factors = barycentre(gram, shares)
  return _mean(point, there, cosines) * factors


@merging(
  'mean direction on the sphere (Riemannian) of the models themselves, not of'
  ' task vectors, times their mean norm, layer by layer',
  weighted=True,
  uses_base=False,
  passes=(Pass(full_gram, coefficients),),
  grouped=True,
  problem=problem,
  as_stored=True,
)
def karcher(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, ' M'],
  weights: Sequence[float] | None = None,
) -> Float[Array, '...']:
  """sum_m c_m leaf_m, (mean norm) times the Karcher mean of leaf_m / |leaf_m|.

  Args:
    base: not used.
    leaves: the models. Those of norm 0 have no direction; they count in the
      mean norm.
    stats: c, the `coefficients` of the group's inner products.
    weights: of directions and norms; uniform by default, normalised.

  Fine-tunes of one base are nearly collinear: their Karcher mean is close to
  their linear mean. mergekit makes ten iterations at most and takes each tensor
  for itself; this iterates until nothing changes, on groups.
  """
  del base, weights  # the weights are in the coefficients
  return weighted_sum(leaves, list(stats))


def _mean(point: Any, weights: Any, cosines: Any) -> Any:
  """`step` until the point stays, from the normalised linear mean.

  Raises UserError if it never does.
  """
  if arrays.namespace(point) is np:
    for _ in range(_STEPS):
      last, point = point, step(point, weights, cosines)
      # Coefficients need not be unique; the point is.
      if length(point - last, cosines) < 1e-12:
        return point
    raise UserError(
      f'karcher: no mean of these models after {_STEPS} steps; their directions'
      ' are too far apart'
    )

  def going(state: Any) -> Any:
    count, last, point = state
    return (count < _STEPS) & (length(point - last, cosines) > 1e-7)

  def onward(state: Any) -> Any:
    count, _, point = state
    return count + 1, point, step(point, weights, cosines)

  import jax  # for its own arrays only

  first = step(point, weights, cosines)
  return jax.lax.while_loop(going, onward, (1, point, first))[2]
