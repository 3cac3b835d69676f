"""SLERP of task vectors (WARP, arXiv 2406.16768, stage 2).

Task vectors are model - base, not normalised; the angle is that of a group of
leaves, a layer by default. Full weights are nearly collinear, so SLERP of those
would be LERP: this file refuses to be that. Everything follows from the inner
products of the task vectors, which add up over leaves. The paper leaves open
what a layer is for embedding and final norm: each is a group of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.combination import weighted_sum
from alignjax.merge.gram import arc, recorded, task_gram
from alignjax.merge.method import RATE, Pass, merging


def coefficients(
  gram: Float[Array, 'M M'], stats: Any = None, *, t: float | None = None
) -> Float[Array, ' M']:
  """Weight of each task vector in the merge; see `slerp` for `t`."""
  del stats
  xp, models = arrays.namespace(gram), len(gram)
  if t is not None and models > 2:
    raise UserError(
      f'slerp takes t for two models only; of {models} models each gets'
      f' the share 1/{models}'
    )
  # The merge so far is sum_m weights_m delta_m.
  weights = xp.eye(1, models, dtype=gram.dtype)[0]
  for m in range(1, models):
    first, second = arc(
      weights @ gram @ weights,
      gram[m, m],
      weights @ gram[:, m],
      1 / (m + 1) if t is None else t,
    )
    unit = xp.eye(1, models, m, dtype=gram.dtype)[0]
    weights = first * weights + second * unit
  return weights


def problem(gram: Float[Array, 'M M']) -> str | None:
  """Why models with these inner products have no SLERP, or None."""
  if np.isfinite(np.asarray(coefficients(gram))).all():
    return None
  return 'the task vectors are opposite, so that no arc is defined'


@merging(
  'on the arc of the task vectors model - base, layer by layer; t for two'
  ' models, uniform and recursive for more',
  numbers={'t': RATE},
  models=(2, None),
  passes=(Pass(task_gram, coefficients),),
  grouped=True,
  problem=problem,
  report=recorded,
  as_stored=True,
)
def slerp(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, ' M'],
  t: float | None = None,
) -> Float[Array, '...']:
  """(1 - sum_m w_m) base + sum_m w_m leaf_m on the arc of the task vectors.

  Args:
    base: the init that the models were trained from.
    leaves: M >= 2 models.
    stats: w, the `coefficients` of the group's inner products.
    t: for two models, the share of the second; the ends reproduce the models
      bit for bit. By default, and for M > 2, uniform: the merge of the first
      m - 1 models is merged with model m at t = 1/m, in order.

  Opposite task vectors give NaN; the callers check `problem` first.
  """
  del t  # is in the coefficients
  return weighted_sum([base, *leaves], [1 - sum(stats), *stats])
