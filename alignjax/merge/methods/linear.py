"""A weighted mean of models: LERP and model soups (WARM, arXiv 2401.12187).

`weighted_sum` is what the other methods end in: they find the weights.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.core.types import UserError


def linear(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  weights: Sequence[float] | None = None,
  t: float | None = None,
) -> Float[Array, '...']:
  """sum_m w_m leaf_m with the weights normalised; `base` does not enter.

  Args:
    base: not used.
    leaves: the models.
    weights: one per model, not all 0; uniform by default.
    t: for two models, short for the weights (1 - t, t).
  """
  del base
  if not leaves:
    raise UserError('linear takes one model or more')
  if t is not None and weights is not None:
    raise UserError('linear takes t or weights, not both')
  if t is not None:
    if len(leaves) != 2:
      raise UserError(f'linear takes t for two models only, not {len(leaves)}')
    return weighted_sum(leaves, jnp.stack([1 - jnp.float32(t), jnp.float32(t)]))
  if weights is None:
    weights = [1.0] * len(leaves)
  if len(weights) != len(leaves):
    raise UserError(
      f'linear takes a weight per model: {len(weights)} weights for'
      f' {len(leaves)} models'
    )
  shares = jnp.stack([jnp.float32(weight) for weight in weights])
  return weighted_sum(leaves, shares / jnp.sum(shares))


def weighted_sum(
  arrays: Sequence[Float[Array, '...']], weights: Float[Array, 'M']
) -> Float[Array, '...']:
  """sum_m weights_m arrays_m; an array that has all the weight, bit for bit.

  The bits (negative zeros, denormals that a compiled product would flush, and
  non-finite values elsewhere) need a selection, not a product with 1.
  """
  total = sum(w * x for w, x in zip(weights, arrays))
  alone = jnp.count_nonzero(weights) == 1
  for w, x in zip(weights, arrays):
    total = jnp.where(alone & (w == 1), x, total)
  return jnp.asarray(total)
