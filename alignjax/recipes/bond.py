"""BOND: distilling best-of-n of an anchor (arXiv 2407.14622, sections 3, 4).

The target is the distribution of the best of n anchor responses. Forward KL:
imitate the best of n draws. Backward KL: a policy gradient with reward
log p_<=(y), the quantile of y's reward among `quantile_count` anchor responses
to the same prompt, and KL strength 1 / (n - 1). With `anchor_period` the
anchor is replaced by the policy every so many steps (iterative BOND, n = 2 or
4); without, it stays the reference.

Deviations from the paper: quantiles are kept from 0 by `quantile_floor`
(default 1 / (quantile_count + 1), the least that so many draws can resolve).
The paper leaves out the reward's second term in practice;
`discrete_correction` adds it, which makes best-of-n the exact optimum for
discrete rewards.
"""

import jax
import jax.numpy as jnp

from alignjax.core.types import Follow, Mean, Model, Recipe, Reward, UserError
from alignjax.losses.calibration import quantile
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.policies.combine import tempered
from alignjax.stages import arrange
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def bond(
  model: Model,
  reward: Reward,
  *,
  n: int = 4,
  jeffreys_weight: float = 0.5,
  anchor_period: int = 0,
  quantile_count: int = 16,
  quantile_floor: float | None = None,
  discrete_correction: bool = False,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """BOND towards best-of-n; equations 9 to 12 and algorithm 1."""
  arrange.check_baseline(baseline)
  if n < 2:
    raise UserError(f'recipe.n: best of {n} is no target; expected 2 or more')
  if quantile_floor is None:
    quantile_floor = 1 / (quantile_count + 1)
  policy = tempered(model.policy('policy'), temperature)
  anchor = tempered(model.policy('anchor'), temperature)

  @jax.jit
  def compare(bundle, batch, key):
    """Columns (y, n draws, reference) -> (y, y*), with y's advantage."""
    del bundle, key
    rewards, weight = batch['reward'], batch['weight']
    below, upto = quantile(
      rewards[:, :1], rewards[:, 1 + n :], weight[:, 1 + n :]
    )
    upto = jnp.maximum(upto, quantile_floor)
    bond_reward = jnp.log(upto)
    if discrete_correction:
      powers = (below / upto)[..., None] ** jnp.arange(n)
      bond_reward += jnp.log(jnp.sum(powers, axis=-1)) / (n - 1)
    best = 1 + jnp.argmax(rewards[:, 1 : 1 + n], axis=1)
    columns = jnp.stack([jnp.zeros_like(best), best], axis=1)
    batch = arrange.choose(batch, columns)
    own = arrange.first(batch, 1)
    log_ratio = jnp.sum(own['sample_logp'] - own['ref_logp'], axis=-1)
    # The factor n - 1 belongs to the backward gradient (equation 11).
    returns = (n - 1) * bond_reward - log_ratio
    advantage = arrange.advantage(returns, own, baseline=baseline)
    zeros = jnp.zeros_like(advantage)  # y* is imitated, not reinforced
    log_quantile = jnp.broadcast_to(jnp.log(upto), batch['reward'].shape)
    return batch | {
      'advantage': jnp.concatenate([advantage, zeros], axis=1),
      'rewards': jnp.concatenate(
        [batch['rewards'], log_quantile[..., None]], axis=-1
      ),
    }

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    own, best = batch['weight'][:, 0], batch['weight'][:, 1]
    backward = reinforce(logp[:, 0], batch['advantage'][:, 0])
    loss = {
      'forward': (
        1 - jeffreys_weight,
        Mean.of(-jnp.sum(logp[:, 1], axis=-1), best),
      ),
      'backward': (jeffreys_weight, Mean.of(backward, own)),
    }
    metrics = summary(
      arrange.first(batch, 1), logp[:, :1], entropy[:, :1], names=names(reward)
    )
    return loss, {
      **metrics,
      'log_quantile': Mean.of(batch['rewards'][:, 0, -1], own),
      'best_reward': Mean.of(batch['reward'][:, 1], best),
    }

  def move(step, leader, me):
    due = (step % anchor_period) == 0
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), leader, me)

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'anchor': model.init},
    follow={'anchor': Follow('policy', move) if anchor_period else None},
    stages=(
      *overlap(
        rollout(
          [(policy, 1), (anchor, n), (anchor, quantile_count)],
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
