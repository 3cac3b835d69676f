"""Score-function losses and their baselines.

A loss whose gradient is -advantage * grad log pi; advantages arrive without
gradient from a stage, so that nothing here depends on how a batch was split.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BASELINES = ('leave_one_out', 'none')


def reinforce(
  logp: Float[Array, '... R'], advantage: Float[Array, '... R']
) -> Float[Array, '...']:
  """-sum_t advantage_t log p_t (Williams 1992); per sequence."""
  return -jnp.sum(logp * jax.lax.stop_gradient(advantage), axis=-1)


def leave_one_out(
  returns: Float[Array, 'B N'], weight: Float[Array, 'B N']
) -> Float[Array, 'B N']:
  """Baseline of each response: the weighted mean return of the others.

  Others are the same prompt's responses where N > 1 (RLOO, arXiv 2402.14740),
  else the rest of the batch. A response without others gets 0.
  """
  axis = 1 if returns.shape[1] > 1 else 0
  weighted = returns * weight
  total = jnp.sum(weighted, axis=axis, keepdims=True) - weighted
  count = jnp.sum(weight, axis=axis, keepdims=True) - weight
  return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0.0)
