"""The exponential moving average of a list of models, in order.

What an anchor that follows a policy would be (WARP, arXiv 2406.16768, stage 1),
of checkpoints that are there already.
"""

from collections.abc import Sequence

from jaxtyping import Float

from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.method import RATE, merging


@merging(
  'moving average of the models in their order; rate is the share of each new'
  ' one, the first is the start',
  numbers={'rate': RATE},
  uses_base=False,
  as_stored=True,
)
def ema(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  rate: float = 0.1,
) -> Float[Array, '...']:
  """e_0 = leaf_0, e_m = (1 - rate) e_{m-1} + rate leaf_m; the last of them.

  In closed form: leaf_m has the weight rate (1 - rate)^(M-1-m), leaf_0 the
  weight (1 - rate)^(M-1). Nothing is rounded in between.

  Args:
    base: not used; to start from it, list it first.
    leaves: the models, oldest first.
    rate: share of each new one. 0 is the first model and 1 the last, bit for
      bit.
  """
  del base
  last = len(leaves) - 1
  keep = [(1 - rate) ** (last - m) for m in range(len(leaves))]
  return weighted_sum(leaves, [keep[0], *[rate * k for k in keep[1:]]])
