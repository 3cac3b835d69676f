"""Points on a sphere, as sums of the directions of M vectors.

What is computed on the sphere of all weights stays in the span of the models,
so that a point is its M coefficients and every inner product follows from the
M x M cosines.
"""

from typing import Any

from jaxtyping import Array, Float

from alignjax.merge import arrays

NO_MEAN = 1e-3  # length of a mean direction below which it is none


def directions(
  gram: Any,
) -> tuple[Float[Array, 'M'], Float[Array, 'M M']]:
  """Norms, and cosines between the vectors; those of zero vectors are 0."""
  xp = arrays.namespace(gram)
  norms = xp.sqrt(xp.maximum(xp.diagonal(gram), 0))
  safe = xp.where(norms > 0, norms, 1)
  cosines = xp.clip(gram / safe[:, None] / safe[None, :], -1, 1)
  one = xp.eye(len(gram), dtype=gram.dtype)
  there = (norms > 0).astype(gram.dtype)
  return norms, xp.where(one == 1, there[:, None], cosines)


def length(point: Float[Array, 'M'], cosines: Float[Array, 'M M']) -> Any:
  """Norm of a sum of directions."""
  xp = arrays.namespace(point)
  return xp.sqrt(xp.maximum(point @ cosines @ point, 0))


def unit(
  point: Float[Array, 'M'], cosines: Float[Array, 'M M']
) -> Float[Array, 'M']:
  """On the sphere; 0 stays 0."""
  xp = arrays.namespace(point)
  norm = length(point, cosines)
  return point / xp.where(norm > 0, norm, 1)


def step(
  point: Float[Array, 'M'],
  weights: Float[Array, 'M'],
  cosines: Float[Array, 'M M'],
) -> Float[Array, 'M']:
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
