"""Inner products of task vectors, of which many methods are functions.

A merge that lies in the span of the task vectors needs, of everything that is
large, only these M x M numbers. They add up over blocks and leaves.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float

from alignjax.merge import arrays, fused
from alignjax.merge.arrays import Array

_COLLINEAR = 1e-6  # sin(angle) below which SLERP is LERP
_OPPOSITE = 1e-3  # radians from pi at which no path is defined


def task_gram(
  base: Float[Array, '...'], leaves: Sequence[Float[Array, '...']], stats: Any
) -> Float[Array, 'M M']:
  """Inner products of leaf - base; NumPy's arrays may be as they are stored."""
  if fused.takes(base, *leaves):
    return fused.gram(base, leaves)
  base, *leaves = map(arrays.float32, (base, *leaves))
  return full_gram(base, [leaf - base for leaf in leaves], stats)


def full_gram(
  base: Float[Array, '...'], leaves: Sequence[Float[Array, '...']], stats: Any
) -> Float[Array, 'M M']:
  """Inner products of the leaves themselves, likewise."""
  del base, stats
  if fused.takes(*leaves):
    return fused.gram(None, leaves)
  leaves = [arrays.float32(leaf) for leaf in leaves]
  xp, models = arrays.namespace(leaves[0]), range(len(leaves))
  found = {
    (i, j): arrays.inner(leaves[i], leaves[j])
    for i in models
    for j in models[: i + 1]
  }
  rows = [[found[max(i, j), min(i, j)] for j in models] for i in models]
  return xp.stack([xp.stack(row) for row in rows])


def angle(aa: Any, bb: Any, ab: Any) -> Any:
  """Radians between two vectors of these products; 0 if one of them is 0."""
  xp = arrays.namespace(ab)
  norms = xp.sqrt(aa) * xp.sqrt(bb)
  cosine = xp.where(norms > 0, ab / xp.where(norms > 0, norms, 1), 1)
  return xp.arccos(xp.clip(cosine, -1, 1))


def arc(aa: Any, bb: Any, ab: Any, share: Any) -> tuple[Any, Any]:
  """Weights of two vectors on the arc between them, at `share` of the way.

  From their inner products. Opposite ones have no arc: NaN.
  """
  xp = arrays.namespace(ab)
  between = angle(aa, bb, ab)
  sine = xp.sin(between)
  flat = (sine < _COLLINEAR) | (aa == 0) | (bb == 0)
  safe = xp.where(flat, 1, sine)
  first = xp.where(flat, 1 - share, xp.sin((1 - share) * between) / safe)
  second = xp.where(flat, share, xp.sin(share * between) / safe)
  bad = between > xp.pi - _OPPOSITE
  return xp.where(bad, xp.nan, first), xp.where(bad, xp.nan, second)


def angles(gram: Any) -> list[float | None]:
  """Degrees between models 0 and 1, 0 and 2, 1 and 2, ...

  A vector of 0 has no angle: None.
  """
  xp = arrays.namespace(gram)
  return [
    round(float(xp.degrees(angle(gram[i, i], gram[j, j], gram[i, j]))), 4)
    if gram[i, i] > 0 and gram[j, j] > 0
    else None
    for j in range(len(gram))
    for i in range(j)
  ]


def recorded(gram: Any) -> dict[str, list[Any]]:
  """What a merge that is a function of these products says of its inputs."""
  norms = [float(gram[i, i]) ** 0.5 for i in range(len(gram))]
  return {'angles_deg': angles(gram), 'norms': norms}
