"""Task arithmetic (arXiv 2212.04089): the base plus a sum of task vectors."""

from collections.abc import Sequence

from jaxtyping import Float

from alignjax.merge.arrays import Array
from alignjax.merge.election import added
from alignjax.merge.method import FACTOR, merging


@merging(
  'base + scale times the sum of weight (model - base); weights 1 by default,'
  ' negative ones forget',
  numbers={'scale': FACTOR},
  weighted=True,
)
def task_arithmetic(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  weights: Sequence[float] | None = None,
  scale: float = 1.0,
) -> Float[Array, '...']:
  """base + scale sum_m w_m (leaf_m - base): addition, and negation by w < 0.

  Args:
    base: the init that the models were trained from.
    leaves: the models.
    weights: one per model, 1 each by default; they are not normalised.
    scale: of the sum, lambda in the paper. One model at scale 1 is that model,
      bit for bit.
  """
  return added(base, leaves, [1.0] * len(leaves), weights, scale)
