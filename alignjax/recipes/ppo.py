"""PPO with a trained value role and a KL penalty (arXiv 1707.06347).

Every token is an action. Its reward is -kl_coef log(pi / reference), and the
last one's also the response's score (arXiv 2203.02155, equation 2). A second
trained role, `value`, is the same net with a scalar head; advantages are
generalised estimates from its values (arXiv 1506.02438). Policy and value are
clipped around where they were when the rollout was drawn (equation 7 for the
policy). The reference is fixed. `start.value = '@policy'` begins with the
policy's weights and a head of zeros, a model directory with its weights and,
where it has one, its scalar head (the `model_value` of a run); an optimizer
table with a rule such as ('value/.*', 3.0) gives the value role another
learning rate.

Deviations from the papers: one pass over a rollout, in `updates` minibatches,
not several; a response that the length limit ends is taken for finished.
Policy and reference are scored as they are sampled: at a temperature,
truncated.

Numbers that default as those of TRL's last PPO do: kl_coef, gamma, gae_lambda,
clip_low, clip_high, clip_value, value_coef.
"""

import math
from functools import partial

import jax

from alignjax.core.types import Mean, Model, Recipe, Reward
from alignjax.losses import value as values
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import clipped, surrogate
from alignjax.policies.combine import sampled
from alignjax.stages import arrange, score
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout


def ppo(
  model: Model,
  reward: Reward,
  *,
  kl_coef: float = 0.05,
  gamma: float = 1.0,
  gae_lambda: float = 0.95,
  whiten_advantage: bool = True,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  clip_value: float = 0.2,
  value_coef: float = 0.1,
  response_count: int = 1,
  updates: int = 1,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Recipe:
  """PPO; equations 7 and 9. Raises UserError for numbers out of range."""
  clip = dict(clip_low=clip_low, clip_high=clip_high)
  arrange.check_ratios(
    kl_coef=kl_coef, updates=updates, temperature=temperature, **clip
  )
  arrange.check_numbers(
    gamma=(gamma, 0, 1),
    gae_lambda=(gae_lambda, 0, 1),
    clip_value=(clip_value, 1e-6, math.inf),
    value_coef=(value_coef, 0, math.inf),
    response_count=(response_count, 1, math.inf),
  )
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy, scalar = as_drawn(model.policy('policy')), model.scalar('value')

  @jax.jit
  def estimate(bundle, batch, key):
    del bundle, key
    mask, value = batch['mask'], batch['value']
    penalty = kl_coef * (batch['sample_logp'] - batch['ref_logp'])
    rewards = batch['reward'][..., None] * values.last(mask) - penalty
    advantage = values.gae(
      rewards, value, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    returns = advantage + value
    if whiten_advantage:
      advantage = values.whiten(advantage, mask * batch['weight'][..., None])
    return batch | {'advantage': advantage, 'returns': returns}

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    value = scalar(bundle, batch)
    per_token = batch['mask'] * batch['weight'][..., None]
    log_ratio = logp - batch['sample_logp']
    loss = surrogate(log_ratio, batch['advantage'], **clip)
    regression = values.clipped_square(
      value, batch['value'], batch['returns'], clip_value=clip_value
    )
    metrics = score.summary(
      batch, logp, entropy, names=score.names(reward), kl='kl', updates=updates
    )
    far = clipped(log_ratio, batch['advantage'], **clip)
    return {
      'policy_gradient': (1.0, Mean.of(loss, per_token)),
      'value': (value_coef, Mean.of(regression, per_token)),
    }, {
      **metrics,
      'clipped': Mean.of(far, per_token),
      'value': Mean.of(batch['value'], per_token),
      'returns': Mean.of(batch['returns'], per_token),
    }

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'reference': model.init}
    | {'value': model.scalar_init},
    follow={'reference': None},
    stages=(
      *overlap(
        rollout(
          [(policy, response_count)],
          max_new_tokens=max_new_tokens,
          stop=model.stop,
          pad=model.pad,
        ),
        score.score(reward),
        chunks=rollout_chunks,
      ),
      score.reference(as_drawn(model.policy('reference'))),
      score.values(scalar),
      estimate,
    ),
    updates=updates,
  )
