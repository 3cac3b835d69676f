"""LITI: from the init towards a model (WARP, arXiv 2406.16768, stage 3).

The rate is the weight of the model. Which init it is, that of the iteration or
the SFT model for the final front, is the caller's choice of base.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.core.types import UserError
from alignjax.merge.methods.linear import weighted_sum


def liti(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  liti_rate: float = 0.5,
) -> Float[Array, '...']:
  """(1 - liti_rate) base + liti_rate leaf, exact at both ends."""
  if len(leaves) != 1:
    raise UserError(f'liti takes one model, not {len(leaves)}')
  rate = jnp.float32(liti_rate)
  return weighted_sum([base, *leaves], jnp.stack([1 - rate, rate]))
