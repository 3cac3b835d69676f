"""NearSwap: the base takes what is near in another model (QuartetAnemoi)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.method import Range, merging


@merging(
  'moves every item of the base towards one model, by t at most',
  numbers={'t': Range(0, np.inf)},
  models=(1, 1),
)
def nearswap(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  t: float = 1e-4,
) -> Float[Array, '...']:
  """base + min(1, t / |delta|) delta, with delta = leaf - base.

  Args:
    base: the model that is changed.
    leaves: the other model; items within t of it are its own, bit for bit.
    t: in the unit of the weights.
  """
  (leaf,) = leaves
  xp = arrays.namespace(base)
  t = xp.asarray(t, dtype=xp.float32)
  delta = leaf - base
  moved = xp.where(t > 0, base + xp.copysign(t, delta), base)
  return xp.where(abs(delta) <= t, leaf, moved)
