"""Score-function losses, their baselines, and estimates of a divergence.

A loss whose gradient is -advantage * grad log pi; advantages arrive without
gradient from a stage, so that nothing here depends on how a batch was split.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BASELINES = ('leave_one_out', 'none')


def reinforce(
  logp: Float[Array, '... R'], advantage: Float[Array, '... R']
) -> Float[Array, '...']:
  """-sum_t advantage_t log p_t (Williams 1992); per sequence."""
  return -jnp.sum(logp * jax.lax.stop_gradient(advantage), axis=-1)


def surrogate(
  log_ratio: Float[Array, '...'],
  advantage: Float[Array, '...'],
  *,
  clip_low: float,
  clip_high: float,
) -> Float[Array, '...']:
  """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A); per action.

  `log_ratio` is log pi - log of the distribution that sampled. PPO, arXiv
  1707.06347, equation 7; with two bounds DAPO, arXiv 2503.14476, equation 8.
  """
  advantage = jax.lax.stop_gradient(advantage)
  ratio = jnp.exp(log_ratio)
  kept = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  return -jnp.minimum(ratio * advantage, kept * advantage)


def clipped(
  log_ratio: Float[Array, '...'],
  advantage: Float[Array, '...'],
  *,
  clip_low: float,
  clip_high: float,
) -> Bool[Array, '...']:
  """Where `surrogate` has no gradient because the ratio has gone too far."""
  ratio = jnp.exp(log_ratio)
  below = (ratio < 1 - clip_low) & (advantage < 0)
  return below | ((ratio > 1 + clip_high) & (advantage > 0))


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


def leave_pairs_out(
  returns: Float[Array, 'B N'],
  weight: Float[Array, 'B N'],
  prompt_id: Int[Array, ' B'],
) -> Float[Array, 'B N']:
  """Baseline of a response's mean score in pairs: what others have without it.

  For returns R_i = sum_{j != i} r(y_i, y_j) / (N - 1) with a symmetric r. The
  other R_j contain y_i, and their mean would shrink the gradient by
  (N - 2) / (N - 1), to nothing at N = 2. Where N > 2 this is the mean of r over
  the pairs of the other responses,
  sum_{j != k; j, k != i} r(y_j, y_k) / ((N - 1) (N - 2)); else the weighted
  mean return of the batch's other prompts, 0 where there are none.
  """
  count = returns.shape[1]
  if count > 2:
    total = jnp.sum(returns, axis=1, keepdims=True)
    return (total - 2 * returns) / (count - 2)
  # A prompt may have several rows of a batch.
  other = (prompt_id[:, None] != prompt_id[None]).astype(jnp.float32)
  total = other @ jnp.sum(returns * weight, axis=1, keepdims=True)
  found = other @ jnp.sum(weight, axis=1, keepdims=True)
  mean = jnp.where(found > 0, total / jnp.where(found > 0, found, 1), 0.0)
  return jnp.broadcast_to(mean, returns.shape)


def group_advantage(
  returns: Float[Array, 'B N'],
  weight: Float[Array, 'B N'],
  *,
  divide: bool,
  epsilon: float = 1e-4,
) -> Float[Array, 'B N']:
  """returns - mean of the group, by `divide` over (its deviation + epsilon).

  A group is a prompt's responses; those of weight 0 are not of it and get 0.
  The deviation has N - 1 in its denominator. GRPO, arXiv 2402.03300, section
  4.1.2; without division Dr. GRPO, arXiv 2503.20783.
  """
  # From a member of the group: equal returns differ from it by exactly 0.
  member = jnp.argmax(weight > 0, axis=1, keepdims=True)
  returns = returns - jnp.take_along_axis(returns, member, axis=1)
  total = jnp.sum(weight, axis=1, keepdims=True)
  share = weight / jnp.where(total > 0, total, 1)
  centred = returns - jnp.sum(share * returns, axis=1, keepdims=True)
  centred = jnp.where(weight > 0, centred, 0.0)
  if not divide:
    return centred
  count = jnp.sum(weight > 0, axis=1, keepdims=True)
  variance = jnp.sum(share * jnp.square(centred), axis=1, keepdims=True)
  variance = variance * count / jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + epsilon)


def flat(
  reward: Float[Array, 'B N'], weight: Float[Array, 'B N']
) -> Bool[Array, ' B']:
  """Prompts all of whose responses have one reward: nothing to compare."""
  high = jnp.max(jnp.where(weight > 0, reward, -jnp.inf), axis=1)
  low = jnp.min(jnp.where(weight > 0, reward, jnp.inf), axis=1)
  return high <= low


# Estimates of KL(pi || ref) from a token that pi drew: k1, k2 and k3 of
# Schulman, "Approximating KL divergence" (2020). Values of k1 and k3 have the
# right mean. As losses, with the drawn token held fixed, they descend something
# else: k1 nothing at all, k2 KL(pi || ref), k3 KL(ref || pi).


def k1(
  logp: Float[Array, '...'], ref_logp: Float[Array, '...']
) -> Float[Array, '...']:
  """log pi - log ref; the gradient of its mean is 0."""
  return logp - ref_logp


def k2(
  logp: Float[Array, '...'], ref_logp: Float[Array, '...']
) -> Float[Array, '...']:
  """(log pi - log ref)^2 / 2; its mean has the gradient of KL(pi || ref)."""
  return jnp.square(logp - ref_logp) / 2


def k3(
  logp: Float[Array, '...'], ref_logp: Float[Array, '...']
) -> Float[Array, '...']:
  """ref / pi - 1 - log(ref / pi) >= 0; GRPO, arXiv 2402.03300, equation 4.

  Its mean has the gradient of KL(ref || pi).
  """
  log_ratio = ref_logp - logp
  return jnp.expm1(log_ratio) - log_ratio
