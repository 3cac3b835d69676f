"""Barycentric interpolation of task vectors on a sphere (Multi-SLERP).

Directions of task vectors are mapped to the tangent space at their weighted
mean direction, averaged there and mapped back; the norm is the weighted mean of
the norms. See goddard.blog/posts/multislerp-wow-what-a-cool-idea.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import recorded, task_gram
from alignjax.merge.method import Pass, merging
from alignjax.merge.methods.linear import normalised
from alignjax.merge.sphere import barycentre, problem, step


def coefficients(
  gram: Float[Array, 'M M'],
  stats: Any = None,
  *,
  weights: Sequence[float] | None = None,
) -> Float[Array, ' M']:
  """Weight of each task vector in the merge; 0 for those that are 0."""
  del stats
  shares = normalised(weights, len(gram))
  point, there, cosines, factors = barycentre(gram, shares)
  return step(point, there, cosines) * factors


@merging(
  'on the sphere of the task vectors, about their weighted mean direction,'
  ' times their mean norm, layer by layer',
  weighted=True,
  passes=(Pass(task_gram, coefficients),),
  grouped=True,
  problem=problem,
  report=recorded,
  as_stored=True,
)
def multislerp(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, ' M'],
  weights: Sequence[float] | None = None,
) -> Float[Array, '...']:
  """base + |delta| exp_p(sum_m w_m log_p(delta_m / |delta_m|)).

  p is the direction of sum_m w_m delta_m / |delta_m|, |delta| the weighted mean
  of the norms. Two models of one norm with the weights 1 - t and t are `slerp`.

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    stats: the `coefficients` of the group's inner products.
    weights: uniform by default, normalised.

  Deviations from mergekit: it projects the directions on the tangent space
  instead of taking the logarithm. The mean of the projections is always 0 (p is
  their weighted mean), so that what it gives is p times the mean norm.
  """
  del weights  # are in the coefficients
  return weighted_sum([base, *leaves], [1 - sum(stats), *stats])
