"""Where a reward stands among reference rewards: quantiles, best-of-n."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def quantile(
  reward: Float[Array, '... N'],
  reference: Float[Array, '... k'],
  weight: Float[Array, '... k'] | None = None,
) -> tuple[Float[Array, '... N'], Float[Array, '... N']]:
  """(p_<, p_<=): mass of the reference strictly below, and not above.

  `weight` are the reference's (unnormalised) probabilities; default uniform.
  BOND (arXiv 2407.14622, section 3.1).
  """
  if weight is None:
    weight = jnp.ones_like(reference)
  weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
  r, ref = reward[..., :, None], reference[..., None, :]
  below = jnp.sum(weight[..., None, :] * (ref < r), axis=-1)
  upto = jnp.sum(weight[..., None, :] * (ref <= r), axis=-1)
  return below, upto


def best_of_n_kl(n: float) -> float:
  """log n - (n - 1) / n: KL of best-of-n to its base, without ties."""
  return math.log(n) - (n - 1) / n
