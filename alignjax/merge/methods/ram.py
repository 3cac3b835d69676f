"""Reinforced Agent Merging (arXiv 2601.13572): changes kept where unique.

Reinforcement learning changes few weights, each agent its own. A mean over all
models would dilute what only one has changed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from alignjax.merge import arrays
from alignjax.merge.arrays import Array
from alignjax.merge.election import moved
from alignjax.merge.method import Range, merging

EPSILON = 1e-5


def changed(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  epsilon: Any,
) -> list[Bool[Array, '...']]:
  """Which items each model has changed by more than epsilon."""
  bound = arrays.namespace(base).asarray(epsilon, dtype=np.float32)
  return [abs(leaf - base) > bound for leaf in leaves]


def shares(changes: Sequence[Any], unique: Sequence[Any]) -> list[Any]:
  """Of each change: `unique` of its model if alone, else one of the count."""
  xp = arrays.namespace(changes[0])
  count = sum(change.astype(xp.float32) for change in changes)
  return [
    xp.where(change, xp.where(count == 1, factor, 1 / xp.maximum(count, 1)), 0)
    for change, factor in zip(changes, unique)
  ]


@merging(
  'items changed by one model keep its change, items changed by several the'
  ' mean of these',
  numbers={'epsilon': Range(0, np.inf)},
)
def ram(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  epsilon: float = EPSILON,
) -> Float[Array, '...']:
  """base + the mean of delta over the models with |delta| > epsilon, per item.

  Args:
    base: the init that the models were trained from.
    leaves: the models; an item that one of them alone has changed is its own,
      bit for bit.
    epsilon: in the unit of the weights.
  """
  changes = changed(base, leaves, epsilon)
  return moved(base, leaves, shares(changes, [np.float32(1)] * len(leaves)))
