"""J-BOND: distilling best-of-2 of a moving anchor (arXiv 2407.14622, sec. 5).

Each step draws one response y from the policy and two from the anchor, whose
better one is y*. The loss is a Jeffreys divergence to best-of-2 of the anchor:
forward, imitate y*; backward, a policy gradient whose reward is -log 16 when y
is worse than both anchor draws and 0 otherwise. The anchor follows the policy
as a moving average after every step, so that best-of-2 compounds; with
`ema_rate` 0 and an `anchor_period` it is replaced every so many steps instead,
the paper's comparison (0.02 against 50), and with neither it is fixed.

Deviations from the paper: its algorithm box prints the anchor regularisation
with the sign that would reward leaving the anchor; the stated objective needs
the other one, which is used here. n is 2 only: the reward for losing is made
for two draws. Policy and anchor are scored as they are sampled: at a
temperature, truncated.
"""

import math
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

# For a fixed y, E[r] = -LOSS_PENALTY (1 - p)^2 meets log p at the median.
LOSS_PENALTY = math.log(16)


def jbond(
  model: Model,
  reward: Reward,
  *,
  jeffreys_weight: float = 0.5,
  ema_rate: float = 0.02,
  anchor_period: int = 0,
  anchor_kl_coef: float = 0.0,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """J-BOND, algorithm 2. `jeffreys_weight` weighs the backward KL."""
  arrange.check_baseline(baseline)
  arrange.check_numbers(
    jeffreys_weight=(jeffreys_weight, 0, 1),
    anchor_kl_coef=(anchor_kl_coef, 0, math.inf),
  )
  moving = follow.anchor(anchor_period=anchor_period, ema_rate=ema_rate)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(model.policy('policy'))
  anchor = as_drawn(model.policy('anchor'))

  @jax.jit
  def compare(bundle, batch, key):
    """Responses (y, y', y'') -> (y, y*), with y's advantage."""
    del bundle, key
    rewards = batch['reward']
    best = 1 + jnp.argmax(rewards[:, 1:], axis=1)
    lost = rewards[:, 0] < jnp.min(rewards[:, 1:], axis=1)
    columns = jnp.stack([jnp.zeros_like(best), best], axis=1)
    batch = arrange.choose(batch, columns)
    own = arrange.first(batch, 1)
    log_ratio = jnp.sum(own['sample_logp'] - own['ref_logp'], axis=-1)
    returns = -LOSS_PENALTY * lost[:, None] - log_ratio
    advantage = arrange.advantage(returns, own, baseline=baseline)
    zeros = jnp.zeros_like(advantage)  # y* is imitated, not reinforced
    return batch | {'advantage': jnp.concatenate([advantage, zeros], axis=1)}

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    own, best = batch['weight'][:, 0], batch['weight'][:, 1]
    seq_logp = jnp.sum(logp, axis=-1)
    seq_ref = jnp.sum(batch['ref_logp'][:, 0], axis=-1)
    log_ratio = jax.lax.stop_gradient(seq_logp[:, 0] - seq_ref)
    backward = reinforce(logp[:, 0], batch['advantage'][:, 0])
    loss = {
      'forward': (1 - jeffreys_weight, Mean.of(-seq_logp[:, 1], best)),
      'backward': (jeffreys_weight, Mean.of(backward, own)),
      'anchor_kl': (anchor_kl_coef, Mean.of(seq_logp[:, 0] * log_ratio, own)),
    }
    metrics = summary(
      arrange.first(batch, 1), logp[:, :1], entropy[:, :1], names=names(reward)
    )
    best_reward = Mean.of(batch['reward'][:, 1], best)
    return loss, {**metrics, 'best_reward': best_reward}

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'anchor': model.init},
    follow={'anchor': moving},
    stages=(
      *overlap(
        rollout(
          [(policy, 1), (anchor, 2)],
          max_new_tokens=max_new_tokens,
          stop=model.stop,
          pad=model.pad,
        ),
        score(reward),
        chunks=rollout_chunks,
      ),
      reference(anchor, first=1),
      compare,
    ),
  )
