"""Sums of arrays with weights: what most methods end in."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from alignjax.merge import arrays, fused
from alignjax.merge.arrays import Array


def weighted_sum(
  terms: Sequence[Float[Array, '...']], weights: Sequence[Any]
) -> Any:
  """sum_m weights_m terms_m; an array that has all the weight, bit for bit.

  NumPy's terms may be as they are stored. The bits (negative zeros, and
  non-finite values elsewhere) need a selection, not a product with 1.
  """
  if all(map(arrays.known, weights)):
    return _known(terms, [np.float32(weight) for weight in weights])
  xp = arrays.namespace(next(w for w in weights if not arrays.known(w)))
  shares = xp.stack([xp.asarray(w, dtype=xp.float32) for w in weights])
  total: Any = sum(w * x for w, x in zip(shares, terms))
  alone = xp.count_nonzero(shares) == 1
  for w, x in zip(shares, terms):
    total = xp.where(alone & (w == 1), x, total)
  return total


def _known(terms: Sequence[Any], weights: Sequence[np.float32]) -> Any:
  used = [(w, x) for w, x in zip(weights, terms) if w != 0]
  if not used:
    return 0 * arrays.float32(terms[0])
  (weight, first), *others = used
  if weight == 1 and not others:
    return arrays.float32(first)
  if fused.takes(*(x for _, x in used)):
    return fused.weighted_sum([x for _, x in used], [w for w, _ in used])
  total = weight * arrays.float32(first)
  if not isinstance(total, np.ndarray):
    return sum((weight * term for weight, term in others), total)
  product: Any = None  # one array for all of them: half of the time
  for weight, term in others:
    product = np.multiply(weight, arrays.float32(term), out=product)
    total += product
  return total
