"""How far a response is from the other responses to its prompt.

r_D(y, z) = 1 - cos(E(y), E(z)), in [0, 2], for an embedding E of responses
(arXiv 2410.06084, equation 3). A response's score is the mean over its prompt's
other responses; the mean of the scores is the diversity D (equation 4). A pair
of a response with itself is no pair.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignjax.core.types import Model, Reward

ROLE = 'embedding'


def diversity(encoder: Model) -> Reward:
  """The reward [B, N, 1] of the role `embedding`; 0 where N = 1."""
  embed = encoder.embed(ROLE)

  @jax.jit
  def reward(bundle, batch, key):
    del key
    fields = {name: batch[name] for name in ('response', 'mask')}
    return to_others(embed(bundle, fields))[..., None]

  def scored(bundle, batch, key):
    return reward(bundle, batch, key)

  scored.roles = {ROLE: encoder.embed_init}
  scored.names = ('diversity',)
  return scored


def to_others(embedding: Float[Array, 'B N E']) -> Float[Array, 'B N']:
  """Mean of 1 - cos to the other N - 1 unit vectors of a row, float32."""
  embedding = embedding.astype(jnp.float32)
  count = embedding.shape[1]
  cosine = jnp.einsum('bie,bje->bij', embedding, embedding)
  apart = (1 - cosine) * (1 - jnp.eye(count))
  return jnp.sum(apart, axis=-1) / max(count - 1, 1)
