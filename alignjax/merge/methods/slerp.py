"""SLERP of task vectors (WARP, arXiv 2406.16768, stage 2).

Task vectors are model - base, not normalised; the angle is that of a group of
leaves, a layer by default. Full weights are nearly collinear, so SLERP of those
would be LERP: this file refuses to be that. Everything follows from the inner
products of the task vectors, which add up over leaves. The paper leaves open
what a layer is for embedding and final norm: each is a group of its own.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignjax.core.types import UserError
from alignjax.merge.methods.linear import weighted_sum

_COLLINEAR = 1e-6  # sin(angle) below which SLERP is LERP
_OPPOSITE = 1e-3  # radians from pi at which no path is defined


def slerp(
  base: Float[Array, '...'],
  leaves: Sequence[Float[Array, '...']],
  *,
  stats: Float[Array, 'M M'] | None = None,
  t: float | None = None,
) -> Float[Array, '...']:
  """(1 - sum_m w_m) base + sum_m w_m leaf_m on the arc of the task vectors.

  Args:
    base: the init that the models were trained from.
    leaves: M >= 2 models.
    stats: inner products of the task vectors over the group; by default those
      of this leaf alone.
    t: for two models, the share of the second; the ends reproduce the models
      bit for bit. By default, and for M > 2, uniform: the merge of the first
      m - 1 models is merged with model m at t = 1/m, in order.

  Opposite task vectors give NaN here; the callers check `problem` first.
  """
  if len(leaves) < 2:
    raise UserError(f'slerp takes two models or more, not {len(leaves)}')
  if t is not None and len(leaves) > 2:
    raise UserError(
      f'slerp takes t for two models only; of {len(leaves)} models each gets'
      f' the share 1/{len(leaves)}'
    )
  if stats is None:
    stats = gram(base, leaves)
  shares = coefficients(stats, t)
  weights = jnp.concatenate([1 - jnp.sum(shares, keepdims=True), shares])
  return weighted_sum([base, *leaves], weights)


def gram(
  base: Float[Array, '...'], leaves: Sequence[Float[Array, '...']]
) -> Float[Array, 'M M']:
  """Inner products of the task vectors of one leaf."""
  deltas = [leaf - base for leaf in leaves]
  # A sum, not a dot: XLA sums in a tree, which keeps float32 accurate.
  return jnp.stack(
    [jnp.stack([jnp.sum(a * b) for b in deltas]) for a in deltas]
  )


stats = gram


def coefficients(
  gram: Float[Array, 'M M'], t: float | Array | None = None
) -> Float[Array, 'M']:
  """Weight of each task vector in the merge; see `slerp` for `t`."""
  gram = jnp.asarray(gram, jnp.float32)
  models = gram.shape[0]
  # The merge so far is sum_m weights_m delta_m.
  weights = jnp.zeros(models, jnp.float32).at[0].set(1)
  for m in range(1, models):
    share = jnp.float32(1 / (m + 1) if t is None else t)
    first, second = _arc(
      weights @ gram @ weights, gram[m, m], weights @ gram[:, m], share
    )
    weights = (first * weights).at[m].set(second)
  return weights


def _arc(aa: Array, bb: Array, ab: Array, share: Array) -> tuple[Array, Array]:
  """Weights of two vectors, from their inner products."""
  angle = _angle(aa, bb, ab)
  sine = jnp.sin(angle)
  flat = (sine < _COLLINEAR) | (aa == 0) | (bb == 0)
  safe = jnp.where(flat, 1, sine)
  first = jnp.where(flat, 1 - share, jnp.sin((1 - share) * angle) / safe)
  second = jnp.where(flat, share, jnp.sin(share * angle) / safe)
  bad = angle > jnp.pi - _OPPOSITE
  return jnp.where(bad, jnp.nan, first), jnp.where(bad, jnp.nan, second)


def _angle(aa: Array, bb: Array, ab: Array) -> Array:
  """Radians between two vectors; 0 if one of them is 0."""
  norms = jnp.sqrt(aa) * jnp.sqrt(bb)
  cosine = jnp.where(norms > 0, ab / jnp.where(norms > 0, norms, 1), 1)
  return jnp.arccos(jnp.clip(cosine, -1, 1))


def problem(gram: Float[Array, 'M M']) -> str | None:
  """Why models with these inner products have no SLERP, or None."""
  if np.isfinite(np.asarray(coefficients(gram, None))).all():
    return None
  return 'the task vectors are opposite, so that no arc is defined'


def report(gram: Float[Array, 'M M']) -> list[float]:
  """Angles in degrees between models 0 and 1, 0 and 2, 1 and 2, ..."""
  gram = jnp.asarray(gram, jnp.float32)
  return [
    round(float(jnp.degrees(_angle(gram[i, i], gram[j, j], gram[i, j]))), 4)
    for j in range(gram.shape[0])
    for i in range(j)
  ]
