"""REINFORCE with a leave-one-out baseline: RLOO (arXiv 2402.14740).

The policy maximises r(y) - kl_coef log(pi(y) / reference(y)), equation 8 there:
a whole response is one action, and its baseline is the mean return of the same
prompt's other responses. The reference is fixed. With `kl_in='reward'` the log
ratio is subtracted from the reward, as in the paper; with 'loss' a term of the
loss pulls back, k2 of every token, whose gradient is that of KL(pi || ref).
`updates` minibatches of one rollout are corrected by the importance ratio of
the whole response, clipped as in PPO; the first ratio of each is 1.

Deviations from the paper: `updates` above 1, which TRL has too. A pull in the
loss sees each token by itself, not the tokens that follow from it. Sampling at
a temperature scores policy and reference at that temperature.

Numbers that default as TRL's do: kl_coef, response_count, clip_low, clip_high,
updates, temperature.
"""

import math

import jax
import jax.numpy as jnp

from alignjax.core.types import Mean, Model, Recipe, Reward
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import clipped, flat, k2, surrogate
from alignjax.policies.combine import tempered
from alignjax.stages import arrange
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def reinforce(
  model: Model,
  reward: Reward,
  *,
  kl_coef: float = 0.05,
  kl_in: str = 'reward',
  response_count: int = 2,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  updates: int = 1,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
) -> Recipe:
  """RLOO; equations 8 and 9. Raises UserError for numbers out of range."""
  clip = dict(clip_low=clip_low, clip_high=clip_high)
  arrange.check_choice('kl_in', kl_in, ('reward', 'loss'))
  arrange.check_ratios(
    kl_coef=kl_coef, updates=updates, temperature=temperature, **clip
  )
  arrange.check_numbers(
    response_count=(response_count, 2, math.inf),  # a response needs others
  )
  policy = tempered(model.policy('policy'), temperature)
  fixed = tempered(model.policy('reference'), temperature)
  in_reward = kl_coef if kl_in == 'reward' else 0.0
  in_loss = kl_coef if kl_in == 'loss' else 0.0

  @jax.jit
  def returns(bundle, batch, key):
    del bundle, key
    log_ratio = jnp.sum(batch['sample_logp'] - batch['ref_logp'], axis=-1)
    total = batch['reward'] - in_reward * log_ratio
    advantage = arrange.advantage(total, batch, baseline='leave_one_out')
    return batch | {'advantage': advantage}

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    weight = batch['weight']
    # One number per response, on each of its tokens; the first is always there.
    advantage = batch['advantage'][..., 0]
    log_ratio = jnp.sum(logp - batch['sample_logp'], axis=-1)
    loss = surrogate(log_ratio, advantage, **clip)
    pull = jnp.sum(k2(logp, batch['ref_logp']), axis=-1)
    metrics = summary(
      batch, logp, entropy, names=names(reward), kl='kl', updates=updates
    )
    return {
      'policy_gradient': (1.0, Mean.of(loss, weight)),
      'kl': (in_loss, Mean.of(pull, weight)),
    }, {
      **metrics,
      'clipped': Mean.of(clipped(log_ratio, advantage, **clip), weight),
      'flat_groups': Mean.of(flat(batch['reward'], weight), weight.mean(1)),
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
      reference(fixed),
      returns,
    ),
    updates=updates,
  )
