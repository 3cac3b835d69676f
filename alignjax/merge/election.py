"""Task vectors of which items are dropped or scaled, and put together.

A method says by which factor each item of each model counts, 0 where it is
dropped; the models then add up, or elect a sign as in TIES (arXiv 2306.01708).
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.core.errors import UserError
from alignjax.merge import arrays
from alignjax.merge.arrays import Array


def moved(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  shares: Sequence[Any],
) -> Float[Array, '...']:
  """base + sum_m shares_m (leaf_m - base), where shares may be per item.

  An item with no share is the base's, one with the share 1 of one model alone
  is that model's, bit for bit.
  """
  xp = arrays.namespace(base)
  shares = [xp.asarray(share, dtype=xp.float32) for share in shares]
  used = sum((share != 0).astype(xp.int32) for share in shares)
  step = sum(share * (leaf - base) for share, leaf in zip(shares, leaves))
  out = xp.where(used == 0, base, base + step)
  for share, leaf in zip(shares, leaves):
    out = xp.where((used == 1) & (share == 1), leaf, out)
  return out


def added(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  factors: Sequence[Any],
  weights: Sequence[Any] | None,
  scale: Any,
) -> Float[Array, '...']:
  """base + scale sum_m w_m factors_m delta_m; weights are 1 by default."""
  weights = _checked(weights, len(leaves), negative=True)
  shares = [scale * w * factor for w, factor in zip(weights, factors)]
  return moved(base, leaves, shares)


def elected(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  factors: Sequence[Any],
  weights: Sequence[Any] | None,
  scale: Any,
) -> Float[Array, '...']:
  """base + scale times the mean of the task vectors that agree, per item.

  With d_m = factors_m delta_m: the elected sign is that of sum_m w_m d_m; the
  mean is sum_m w_m d_m / sum_m w_m over the models with sign(d_m) elected,
  those with d_m = 0 left out. Where the sum is 0, the base stays.

  Raises UserError for a negative weight, of which there is no mean.
  """
  xp = arrays.namespace(base)
  weights = _checked(weights, len(leaves), negative=False)
  sparse = [factor * (leaf - base) for factor, leaf in zip(factors, leaves)]
  sign = xp.sign(sum(w * d for w, d in zip(weights, sparse)))
  votes = [
    xp.where((sign != 0) & (xp.sign(d) == sign), w, xp.float32(0))
    for w, d in zip(weights, sparse)
  ]
  total = sum(votes)
  total = xp.where(total == 0, xp.float32(1), total)
  shares = [
    scale * factor * (vote / total) for factor, vote in zip(factors, votes)
  ]
  return moved(base, leaves, shares)


def _checked(weights: Any, models: int, *, negative: bool) -> list[Any]:
  weights = [1.0] * models if weights is None else weights
  for weight in weights:
    if not negative and arrays.known(weight) and weight < 0:
      raise UserError(
        f'weights must not be negative where a sign is elected, found {weight}'
      )
  return [arrays.float32(weight) for weight in weights]
