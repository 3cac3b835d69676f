"""Divergences between next-token distributions, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kl(
  p_logits: Float[Array, '... V'], q_logits: Float[Array, '... V']
) -> Float[Array, '...']:
  """KL(p || q), exact over the vocabulary, float32."""
  p = jax.nn.log_softmax(p_logits.astype(jnp.float32), axis=-1)
  q = jax.nn.log_softmax(q_logits.astype(jnp.float32), axis=-1)
  return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
