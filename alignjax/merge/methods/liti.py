"""LITI: from the init towards a model (WARP, arXiv 2406.16768, stage 3).

The rate is the weight of the model. Which init it is, that of the iteration or
the SFT model for the final front, is the caller's choice of base.
"""

from collections.abc import Sequence

from jaxtyping import Float

from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.method import RATE, merging


@merging(
  "from the base towards one model; liti_rate is the model's share",
  numbers={'liti_rate': RATE},
  models=(1, 1),
  as_stored=True,
)
def liti(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  liti_rate: float = 0.5,
) -> Float[Array, '...']:
  """(1 - liti_rate) base + liti_rate leaf, exact at both ends."""
  return weighted_sum([base, *leaves], [1 - liti_rate, liti_rate])
