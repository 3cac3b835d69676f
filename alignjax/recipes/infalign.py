"""CTRL: calibrate and transform the reward (InfAlign, arXiv 2412.19792).

A policy that will be used through best-of-n, or attacked through worst-of-n,
should not be trained for its plain win rate. CTRL maximises
E[Phi(C)] - kl_coef KL(policy || reference), where C is the chance that a
response beats a reference response to the same prompt, estimated from rewards
that were computed once (`ref_reward`), and Phi is an increasing function:
exp(t u) suits best-of-n, -exp(-t u) worst-of-n, identity the plain win rate,
and log distils best-of-n. `transform_scale` is t, negative for worst-of-n.

Deviations from the paper: Phi is normalised to map [0, 1] onto itself, so
that kl_coef is of one size for all; REINFORCE with a leave-one-out baseline
takes the place of PPO. Under noise in C an exponential is biased upwards
(a factor of 2 at t = 10 with 16 reference responses, 1.1 with 100), and C
tells nothing beyond a KL of about the log of their number.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Mean,
  Model,
  Recipe,
  Reward,
)
from alignjax.losses import calibration
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.policies.combine import sampled
from alignjax.stages import arrange
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def infalign(
  model: Model,
  reward: Reward,
  *,
  transform: str = 'exp',
  transform_scale: float = 10.0,
  transform_floor: float = 0.005,
  kl_coef: float = 0.1,
  response_count: int = 2,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """KL-regularised RL on Phi(C); section 4 and algorithm 1.

  Raises UserError where a batch has no `ref_reward`.
  """
  arrange.check_baseline(baseline)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(model.policy('policy'))
  anchor = as_drawn(model.policy('reference'))
  phi = calibration.transform(transform, transform_scale, transform_floor)

  def returns(bundle, batch, key):
    del bundle, key
    if 'ref_reward' not in batch:
      raise UserError(
        'recipe infalign: rows without ref_reward; the source must be '
        'calibrated (rewards of reference responses to each of its prompts)'
      )
    return transformed(batch)

  @jax.jit
  def transformed(batch):
    chance = calibration.calibrated(batch['reward'], batch['ref_reward'])
    log_ratio = jnp.sum(batch['sample_logp'] - batch['ref_logp'], axis=-1)
    total = phi(chance) - kl_coef * log_ratio
    return batch | {
      'advantage': arrange.advantage(total, batch, baseline=baseline),
      'rewards': jnp.concatenate(
        [batch['rewards'], chance[..., None], phi(chance)[..., None]], axis=-1
      ),
    }

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    loss = Mean.of(reinforce(logp, batch['advantage']), batch['weight'])
    metrics = summary(batch, logp, entropy, names=names(reward))
    chance, value = batch['rewards'][..., -2], batch['rewards'][..., -1]
    return {'policy_gradient': (1.0, loss)}, {
      **metrics,
      'calibrated': Mean.of(chance, batch['weight']),
      'transformed': Mean.of(value, batch['weight']),
    }

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'reference': model.init},
    follow={'reference': None},
    stages=(
      *overlap(
        rollout(
          [(policy, response_count)],
          max_new_tokens=max_new_tokens,
          stop=model.stop,
          pad=model.pad,
        ),
        score(reward),
        chunks=rollout_chunks,
      ),
      reference(anchor),
      returns,
    ),
  )
