"""Points on a sphere, as sums of the directions of M vectors.

What is computed on the sphere of all weights stays in the span of the models,
so that a point is its M coefficients and every inner product follows from the
M x M cosines.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array

NO_MEAN = 1e-3  # length of a mean direction below which it is none


def directions(
  gram: Any,
) -> tuple[Any, Any]:
  """Norms [M], and cosines [M, M]; those of zero vectors are 0."""
  xp = arrays.namespace(gram)
  norms = xp.sqrt(xp.maximum(xp.diagonal(gram), 0))
  safe = xp.where(norms > 0, norms, 1)
  cosines = xp.clip(gram / safe[:, None] / safe[None, :], -1, 1)
  one = xp.eye(len(gram), dtype=gram.dtype)
  there = (norms > 0).astype(gram.dtype)
  return norms, xp.where(one == 1, there[:, None], cosines)


def length(point: Any, cosines: Any) -> Any:
  """Norm of a sum of directions."""
  xp = arrays.namespace(point)
  return xp.sqrt(xp.maximum(point @ cosines @ point, 0))


def unit(
  point: Float[Array, ' M'], cosines: Float[Array, 'M M']
) -> Float[Array, ' M']:
  """On the sphere; 0 stays 0."""
  xp = arrays.namespace(point)
  norm = length(point, cosines)
  return point / xp.where(norm > 0, norm, 1)


def barycentre(
  gram: Float[Array, 'M M'], weights: Sequence[Any]
) -> tuple[Float[Array, ' M'], Float[Array, ' M'], Float[Array, 'M M'], Any]:
  """Where interpolation on a sphere starts: the weighted mean direction.

  Args:
    gram: inner products of M vectors.
    weights: with the sum 1. Vectors of norm 0 have no direction: the weights of
      directions are those of the others, normalised again.

  Returns:
    The point, the weights of directions, the cosines, and factors [M] that make
    of a point the coefficients of the vectors: the weighted mean of all norms,
    divided by each norm.

  Raises UserError for a negative weight, and for directions that cancel; of
  traced numbers those give NaN.
  """
  xp = arrays.namespace(gram)
  if any(arrays.known(w) and w < 0 for w in weights):
    raise UserError(
      f'weights on a sphere must not be negative, found {list(weights)}'
    )
  norms, cosines = directions(gram)
  shares = xp.stack([xp.asarray(w, dtype=gram.dtype) for w in weights])
  there = shares * (norms > 0)
  whole = xp.sum(there)
  there = there / xp.where(whole != 0, whole, 1)
  size = length(there, cosines)
  lost = (size < NO_MEAN) & (whole != 0)
  if xp is np and lost:
    raise UserError(
      'with these weights the directions of the models cancel, so that they'
      ' have no mean'
    )
  point = xp.where(lost, xp.nan, unit(there, cosines))
  factors = (shares @ norms) / xp.where(norms > 0, norms, 1)
  return point, there, cosines, factors


def problem(gram: Any) -> str | None:
  """Why vectors with these inner products have no mean direction, or None.

  With equal weights: others are not at hand where groups are judged.
  """
  norms, cosines = directions(np.asarray(gram, np.float64))
  there = (norms > 0) / max(1, np.count_nonzero(norms))
  if there.any() and length(there, cosines) < NO_MEAN:
    return 'the directions of the models cancel, so that they have no mean'
  return None


def step(
  point: Float[Array, ' M'],
  weights: Float[Array, ' M'],
  cosines: Float[Array, 'M M'],
) -> Float[Array, ' M']:
  """exp_p(sum_i w_i log_p(u_i)): the barycentre seen from a point p.

  log_p(u) = angle / sin(angle) (u - cos(angle) p). One step is exact on a
  circle (two models); repeated, it goes to the Riemannian mean.
  """
  xp = arrays.namespace(point)
  cosine = xp.clip(cosines @ point, -1, 1)
  angle = xp.arccos(cosine)
  sine = xp.sin(angle)
  far = sine > 1e-4
  pull = weights * xp.where(far, angle / xp.where(far, sine, 1), 1)
  tangent = pull - (pull @ cosine) * point
  size = length(tangent, cosines)
  moving = size > 1e-7
  safe = xp.where(moving, size, 1)
  reach = xp.where(moving, xp.sin(safe) / safe, 1)
  return unit(xp.cos(size) * point + reach * tangent, cosines)
