"""GRPO: rewards compared within a group, no value model (arXiv 2402.03300).

A response's advantage is its reward minus the mean of its prompt's responses,
over their deviation; every token gets it, with PPO's clipped ratio and a k3
pull to a fixed reference in the loss (equations 3 and 4). Variants are numbers:

  as in the paper          the defaults
  DAPO (arXiv 2503.14476)  mean_over='token', clip_high=0.28, kl_coef=0
  Dr. GRPO (2503.20783)    mean_over='constant', divide_by_std=False, kl_coef=0
  GSPO (arXiv 2507.18071)  ratio_of='sequence', clip_low=3e-4, clip_high=4e-4,
                           kl_coef=0

Without `kl_coef` there is no reference role. A prompt whose rewards are all
equal teaches nothing: `flat_groups` is the share of those.

Deviations from the paper: one pass over a rollout in `updates` minibatches,
over each of which 'token' takes its mean; the paper's groups are of 64.
Sampling at a temperature scores policy and reference at that temperature. The
k3 pull descends KL(ref || pi), so that the optimum is not the tilted reference
(arXiv 2502.18548).

Numbers that default as the paper's do: kl_coef; as TRL's: response_count,
clip_low, clip_high, updates, temperature.
"""

import math

import jax
import jax.numpy as jnp

from alignjax.core.types import Mean, Model, Recipe, Reward
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import (
  clipped,
  flat,
  group_advantage,
  k3,
  surrogate,
)
from alignjax.policies.combine import tempered
from alignjax.stages import arrange
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def _by_response(x, batch):
  tokens = jnp.maximum(jnp.sum(batch['mask'], axis=-1), 1)
  return Mean.of(jnp.sum(x * batch['mask'], axis=-1) / tokens, batch['weight'])


def _by_token(x, batch):
  return Mean.of(x, batch['mask'] * batch['weight'][..., None])


def _by_constant(x, batch):
  total = jnp.sum(x * batch['mask'], axis=-1)
  return Mean.of(total / x.shape[-1], batch['weight'])


def _of_token(log_ratio, mask):
  del mask
  return log_ratio


def _of_sequence(log_ratio, mask):
  total = jnp.sum(log_ratio * mask, axis=-1, keepdims=True)
  tokens = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
  return jnp.broadcast_to(total / tokens, log_ratio.shape)


MEANS = {
  'response': _by_response,  # of means over tokens
  'token': _by_token,  # of the whole minibatch
  'constant': _by_constant,  # of sums over tokens, by max_new_tokens
}
RATIOS = {'token': _of_token, 'sequence': _of_sequence}


def grpo(
  model: Model,
  reward: Reward,
  *,
  kl_coef: float = 0.04,
  response_count: int = 8,
  divide_by_std: bool = True,
  mean_over: str = 'response',
  ratio_of: str = 'token',
  clip_low: float = 0.2,
  clip_high: float = 0.2,
  updates: int = 1,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
) -> Recipe:
  """GRPO; equation 3. Raises UserError for numbers out of range."""
  clip = dict(clip_low=clip_low, clip_high=clip_high)
  arrange.check_choice('mean_over', mean_over, tuple(MEANS))
  arrange.check_choice('ratio_of', ratio_of, tuple(RATIOS))
  arrange.check_ratios(
    kl_coef=kl_coef, updates=updates, temperature=temperature, **clip
  )
  arrange.check_numbers(
    response_count=(response_count, 2, math.inf),  # a group of one is flat
  )
  policy = tempered(model.policy('policy'), temperature)
  fixed = tempered(model.policy('reference'), temperature)
  mean, ratio = MEANS[mean_over], RATIOS[ratio_of]

  @jax.jit
  def compare(bundle, batch, key):
    del bundle, key
    advantage = group_advantage(
      batch['reward'], batch['weight'], divide=divide_by_std
    )
    return batch | {'advantage': advantage[..., None] * batch['mask']}

  def gain(bundle, batch, key):
    """The loss without reference, and log p of every token."""
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    weight, advantage = batch['weight'], batch['advantage']
    log_ratio = ratio(logp - batch['sample_logp'], batch['mask'])
    metrics = summary(
      batch, logp, entropy, names=names(reward), kl='kl', updates=updates
    )
    loss = mean(surrogate(log_ratio, advantage, **clip), batch)
    far = clipped(log_ratio, advantage, **clip)
    metrics = {
      **metrics,
      'clipped': _by_token(far, batch),
      'flat_groups': Mean.of(flat(batch['reward'], weight), weight.mean(1)),
    }
    return {'policy_gradient': (1.0, loss)}, metrics, logp

  def free(bundle, batch, key):
    return gain(bundle, batch, key)[:2]

  def pulled(bundle, batch, key):
    loss, metrics, logp = gain(bundle, batch, key)
    pull = mean(k3(logp, batch['ref_logp']), batch)
    return loss | {'kl': (kl_coef, pull)}, metrics

  kept = {'reference': model.init} if kl_coef else {}
  return Recipe(
    objective=pulled if kl_coef else free,
    init={'policy': model.init, **kept},
    follow={role: None for role in kept},
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
      *([reference(fixed)] if kl_coef else []),
      compare,
    ),
    updates=updates,
  )
