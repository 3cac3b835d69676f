"""SLERP of the weights themselves, as tools without task vectors have it.

Fine-tunes of one base are nearly collinear as whole weights, so that this is
nearly LERP; what WARP means is `slerp`, of the task vectors. It is for models
without a common base, and to reproduce merges of that kind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import arc, full_gram, recorded
from alignjax.merge.method import RATE, Pass, merging


def coefficients(
  gram: Float[Array, '2 2'], stats: Any = None, *, t: float = 0.5
) -> tuple[Any, Any]:
  """Weights of the two models."""
  del stats
  return arc(gram[0, 0], gram[1, 1], gram[0, 1], t)


def problem(gram: Float[Array, '2 2']) -> str | None:
  """Why these models have no SLERP, or None."""
  if np.isfinite(np.asarray(coefficients(gram))).all():
    return None
  return 'the models are opposite, so that no arc is defined'


@merging(
  'on the arc of the weights of two models themselves, without a base; nearly'
  ' lerp for fine-tunes of one model',
  numbers={'t': RATE},
  models=(2, 2),
  uses_base=False,
  passes=(Pass(full_gram, coefficients),),
  grouped=True,
  problem=problem,
  report=recorded,
  as_stored=True,
)
def slerp_raw(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: tuple[Any, Any],
  t: float = 0.5,
) -> Float[Array, '...']:
  """sin((1-t) a) / sin(a) leaf_0 + sin(t a) / sin(a) leaf_1.

  a is the angle between the models of a group of leaves. Their norms are not
  made equal, as in `slerp`: the norm goes from one to the other.

  Args:
    base: not used.
    leaves: two models.
    stats: the `coefficients` of the group's inner products.
    t: share of the second; the ends are the models bit for bit.
  """
  del base, t  # t is in the coefficients
  return weighted_sum(leaves, list(stats))
