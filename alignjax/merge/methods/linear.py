"""A weighted mean of models: LERP and model soups (WARM, arXiv 2401.12187)."""

from collections.abc import Sequence

from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.method import RATE, merging


@merging(
  'weighted mean of the models; for two, t is the share of the second',
  numbers={'t': RATE},
  weighted=True,
  uses_base=False,
  as_stored=True,
)
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
    weights: one per model; uniform by default.
    t: for two models, short for the weights (1 - t, t).
  """
  del base
  if t is not None and weights is not None:
    raise UserError('linear takes t or weights, not both')
  if t is None:
    return weighted_sum(leaves, normalised(weights, len(leaves)))
  if len(leaves) != 2:
    raise UserError(f'linear takes t for two models only, not {len(leaves)}')
  share = arrays.float32(t)
  return weighted_sum(leaves, [1 - share, share])


def normalised(weights: Sequence[float] | None, models: int) -> list[float]:
  """Weights with the sum 1; uniform where there are none.

  Raises UserError where the sum is 0.
  """
  weights = [1.0] * models if weights is None else weights
  total = sum(weights)
  if arrays.known(total) and total == 0:
    raise UserError(f'weights must not sum to 0, found {list(weights)}')
  return [weight / total for weight in weights]
