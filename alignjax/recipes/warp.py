"""WARP's inner objective: REINFORCE towards a moving anchor (arXiv 2406.16768).

Stage 1 of WARP: the policy maximises r(y) - kl_coef log(pi(y) / anchor(y)) and
the anchor is its own exponential moving average, so that the pull to the start
weakens as training goes on. Stages 2 and 3, SLERP of the runs and
interpolation towards the initialisation, are merges of the results.

Deviations from the paper: the baseline, which the paper does not give, is the
mean return of a prompt's other responses; policy and anchor are scored as they
are sampled, at a temperature and truncated, so that the optimum is exact.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.core import follow
from alignjax.core.types import Mean, Model, Recipe, Reward
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.policies.combine import sampled
from alignjax.stages import arrange
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def warp(
  model: Model,
  reward: Reward,
  *,
  kl_coef: float = 0.1,
  ema_rate: float = 0.01,
  response_count: int = 2,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 0.9,
  top_k: int = 0,
  top_p: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """REINFORCE with KL to an EMA anchor; section 3.1, equations 1 and 2."""
  arrange.check_baseline(baseline)
  moving = follow.anchor(anchor_period=0, ema_rate=ema_rate)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(model.policy('policy'))
  anchor = as_drawn(model.policy('anchor'))

  @jax.jit
  def returns(bundle, batch, key):
    del bundle, key
    log_ratio = jnp.sum(batch['sample_logp'] - batch['ref_logp'], axis=-1)
    total = batch['reward'] - kl_coef * log_ratio
    return batch | {
      'advantage': arrange.advantage(total, batch, baseline=baseline)
    }

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    loss = Mean.of(reinforce(logp, batch['advantage']), batch['weight'])
    metrics = summary(batch, logp, entropy, names=names(reward))
    return {'policy_gradient': (1.0, loss)}, metrics

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'anchor': model.init},
    follow={'anchor': moving},
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
