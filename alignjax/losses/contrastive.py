"""Contrastive losses on unit vectors: what belongs together, and what not.

Distances are 1 - cos, in [0, 2]: those of `rewards.diversity`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Triplets(NamedTuple):
  """One triplet for each anchor, all [B, N].

  Attributes:
    loss: max(0, margin + positive - negative).
    positive: distance to the anchor's partner.
    negative: distance to the negative that was chosen.
    first: whether the partner is nearer than every negative.
  """

  loss: Array
  positive: Array
  negative: Array
  first: Array


def semi_hard_triplets(
  embedding: Float[Array, 'B N E'], margin: float
) -> Triplets:
  """Triplets within each row; vectors 2k and 2k + 1 belong together.

  Every vector is an anchor once. Its negative is the nearest of those farther
  than its partner, which is semi-hard where it is within the margin and costs
  nothing beyond; where all negatives are nearer than the partner, the farthest
  of them (FaceNet, arXiv 1503.03832, section 3.2). N is even and 4 or more.
  """
  embedding = embedding.astype(jnp.float32)
  count = embedding.shape[1]
  distance = 1 - jnp.einsum('bie,bje->bij', embedding, embedding)
  place = jnp.arange(count)
  partner = place ^ 1
  positive = jnp.take_along_axis(distance, partner[None, :, None], axis=-1)
  others = (place[:, None] // 2) != (place[None] // 2)
  outside = others & (distance > positive)
  nearest = jnp.min(jnp.where(outside, distance, jnp.inf), axis=-1)
  farthest = jnp.max(jnp.where(others, distance, -jnp.inf), axis=-1)
  negative = jnp.where(jnp.any(outside, axis=-1), nearest, farthest)
  positive = positive[..., 0]
  return Triplets(
    loss=jnp.maximum(0.0, margin + positive - negative),
    positive=positive,
    negative=negative,
    first=jnp.all(outside | ~others, axis=-1),
  )
