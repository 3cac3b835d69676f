"""How models lie about their base: what a merge of them will have to do.

Norms of task vectors and the angles between them (WARP, arXiv 2406.16768,
figures 3 and 15), distances between the weights, and how often task vectors
disagree about a sign (TIES, arXiv 2306.01708). One reading of the inputs, leaf
by leaf and block by block.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from alignjax.interop.opened import Opened
from alignjax.merge import arrays, blocks, gram, inputs, method
from alignjax.merge.method import Method, Pass
from alignjax.merge.methods import slerp


class Geometry(NamedTuple):
  """Of a group of leaves, for M models.

  Attributes:
    weights: norm of the base.
    gram: [M, M] inner products of the task vectors.
    moved: items that two or more models have moved.
    torn: those of them whose models disagree about the sign.
  """

  weights: float
  gram: np.ndarray
  moved: int
  torn: int

  @property
  def norms(self) -> np.ndarray:
    """[M] of the task vectors."""
    return np.sqrt(np.diagonal(self.gram))

  @property
  def angles(self) -> list[float | None]:
    """Degrees between models 0 and 1, 0 and 2, 1 and 2, ...

    A model that has not moved has no angle: None.
    """
    return gram.angles(self.gram)

  @property
  def lerp(self) -> float:
    """Norm of the mean of the task vectors."""
    return float(max(self.gram.mean(), 0)) ** 0.5

  @property
  def slerp(self) -> float | None:
    """Norm of the task vector that SLERP makes of them, in equal shares.

    Of this group as one angle. None for opposite vectors, which have no arc.
    """
    products: Any = self.gram
    weights = slerp.coefficients(products)
    square = float(weights @ products @ weights)
    return max(square, 0) ** 0.5 if np.isfinite(square) else None

  @property
  def distances(self) -> np.ndarray:
    """[M + 1, M + 1] between the weights of base and models."""
    g = np.pad(self.gram, (1, 0))
    squares = np.diagonal(g)[:, None] + np.diagonal(g)[None] - 2 * g
    return np.sqrt(np.maximum(squares, 0))

  @property
  def conflicts(self) -> float | None:
    """Share of the items moved by several whose signs disagree."""
    return self.torn / self.moved if self.moved else None


def _measure(base: Any, leaves: Sequence[Any], stats: Any) -> np.ndarray:
  products = gram.task_gram(base, leaves, stats)
  signs = np.stack([np.sign(leaf - base) for leaf in leaves])
  moved = np.abs(signs).sum(0)
  several = moved >= 2
  torn = several & (np.abs(signs.sum(0)) < moved)
  counts = [arrays.inner(base, base), several.sum(), torn.sum()]
  return np.concatenate([products.reshape(-1), np.array(counts, np.float64)])


_MEASURED = Method(
  'geometry',
  _measure,
  about='measures; it merges nothing',
  numbers={},
  passes=(Pass(_measure, lambda total, stats: total),),
)


def geometry(
  base: Opened,
  models: Sequence[Opened],
  group: str = 'layer',
  step: Callable[[str], None] = lambda name: None,
) -> dict[str, Geometry]:
  """Of every group of float leaves, and of 'all' together."""
  totals: dict[str, np.ndarray] = {}
  with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    for name, spec in base.leaves.items():
      if not arrays.floating(spec.dtype):
        continue
      found = inputs.matrices((base, *models), name, base.format == 'hf', '')
      rows, columns = found[0].shape
      leaf = blocks.Leaf(
        name, rows, columns, lambda a, b, found=found: [x[a:b] for x in found]
      )
      part = blocks.total(_MEASURED, 0, leaf, None, pool)
      for key in {method.group_of(name, group), 'all'}:
        totals[key] = totals.get(key, 0) + part
      step(name)
  return {key: _of(total, len(models)) for key, total in totals.items()}


def _of(total: np.ndarray, models: int) -> Geometry:
  return Geometry(
    weights=float(total[-3]) ** 0.5,
    gram=total[:-3].reshape(models, models),
    moved=int(total[-2]),
    torn=int(total[-1]),
  )
