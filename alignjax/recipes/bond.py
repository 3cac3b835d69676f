"""BOND: distilling best-of-n of an anchor (arXiv 2407.14622, sections 3, 4).

The target is the distribution of the best of n anchor responses. Forward KL:
imitate the best of n draws. Backward KL: a policy gradient with reward
log p_<=(y), the quantile of y's reward among anchor responses to the same
prompt, and KL strength 1 / (n - 1).

The quantile is counted among `quantile_count` further draws, or with
`quantile='learned'` told by a classifier: a second trained role, `quantile`,
the same net with a scalar head that reads prompt and response. It is fitted at
the same time to 1{r(y') <= r(y)} of one anchor draw y' (of `quantile_count`).
`start.quantile = '@policy'` begins with the policy's weights.

The anchor stays the reference, is replaced by the policy every `anchor_period`
steps (iterative BOND, n = 2 or 4), or follows it as a moving average of
`ema_rate`.

Deviations from the paper: counted quantiles are kept from 0 by
`quantile_floor` (default 1 / (quantile_count + 1), the least that so many draws
can resolve). The paper leaves out the reward's second term in practice;
`discrete_correction` adds it, which makes best-of-n the exact optimum for
discrete rewards. Sampling at a temperature scores policy and anchor at that
temperature.
"""

import math

import jax
import jax.numpy as jnp

from alignjax.core import follow
from alignjax.core.types import Mean, Model, Recipe, Reward, UserError
from alignjax.losses.calibration import quantile as quantile_of
from alignjax.losses.calibration import quantile_nll
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.losses.value import of_response
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
  ema_rate: float = 0.0,
  quantile: str = 'sampled',
  quantile_count: int | None = None,
  quantile_floor: float | None = None,
  discrete_correction: bool = False,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """BOND towards best-of-n; equations 9 to 12 and algorithm 1.

  quantile_count: by default 16 draws to count, or 1 to learn from.
  Raises UserError for numbers out of range and what learning cannot have.
  """
  arrange.check_baseline(baseline)
  arrange.check_choice('quantile', quantile, ('sampled', 'learned'))
  learned = quantile == 'learned'
  count = (1 if learned else 16) if quantile_count is None else quantile_count
  arrange.check_numbers(
    jeffreys_weight=(jeffreys_weight, 0, 1), quantile_count=(count, 1, math.inf)
  )
  if n < 2:
    raise UserError(f'recipe.n: best of {n} is no target; expected 2 or more')
  if learned:
    _check_learned(quantile_floor, discrete_correction)
  moving = follow.anchor(anchor_period=anchor_period, ema_rate=ema_rate)
  floor = 1 / (count + 1) if quantile_floor is None else quantile_floor
  policy = tempered(model.policy('policy'), temperature)
  anchor = tempered(model.policy('anchor'), temperature)
  scalar = model.scalar('quantile')

  # Where log p_<= [B, N] comes from, and what is to be learned for it.
  def counted(bundle, own, upto):
    del bundle, own
    return jnp.log(jnp.maximum(upto, floor))

  def classified(bundle, own, upto):
    del upto
    return jax.nn.log_sigmoid(of_response(scalar, bundle, own))

  def nothing(bundle, own, upto):
    del bundle, own, upto
    return {}

  def classify(bundle, own, upto):
    logit = of_response(scalar, bundle, own)
    loss = Mean.of(quantile_nll(logit, upto), own['weight'])
    return {'quantile': (1.0, loss)}

  log_quantile = classified if learned else counted
  learn = classify if learned else nothing

  @jax.jit
  def compare(bundle, batch, key):
    """Columns (y, n draws, reference) -> (y, y*), with y's advantage.

    Two numbers join the rewards: the share p_<= of the reference draws, and
    log p_<= as the policy was rewarded for it.
    """
    del key
    rewards, weight = batch['reward'], batch['weight']
    below, upto = quantile_of(
      rewards[:, :1], rewards[:, 1 + n :], weight[:, 1 + n :]
    )
    log_p = log_quantile(bundle, arrange.first(batch, 1), upto)
    bond_reward = log_p
    if discrete_correction:
      powers = (below / jnp.exp(log_p))[..., None] ** jnp.arange(n)
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
    told = [jnp.broadcast_to(x, (len(x), 2)) for x in (upto, log_p)]
    return batch | {
      'advantage': jnp.concatenate([advantage, zeros], axis=1),
      'rewards': jnp.concatenate(
        [batch['rewards'], jnp.stack(told, axis=-1)], axis=-1
      ),
    }

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    y, weight = arrange.first(batch, 1), batch['weight']
    backward = reinforce(logp[:, 0], batch['advantage'][:, 0])
    forward = -jnp.sum(logp[:, 1], axis=-1)
    loss = {
      'forward': (1 - jeffreys_weight, Mean.of(forward, weight[:, 1])),
      'backward': (jeffreys_weight, Mean.of(backward, weight[:, 0])),
    } | learn(bundle, y, y['rewards'][..., -2])
    metrics = summary(y, logp[:, :1], entropy[:, :1], names=names(reward))
    return loss, {
      **metrics,
      'log_quantile': Mean.of(batch['rewards'][:, 0, -1], weight[:, 0]),
      'best_reward': Mean.of(batch['reward'][:, 1], weight[:, 1]),
    }

  init = {'policy': model.init, 'anchor': model.init}
  return Recipe(
    objective=objective,
    init=init | ({'quantile': model.scalar_init} if learned else {}),
    follow={'anchor': moving},
    stages=(
      *overlap(
        rollout(
          [(policy, 1), (anchor, n), (anchor, count)],
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


def _check_learned(floor: float | None, discrete_correction: bool) -> None:
  """A classifier knows p_<= only, and never says 0."""
  for name, given in (
    ('quantile_floor', floor is not None),
    ('discrete_correction', discrete_correction),
  ):
    if given:
      raise UserError(
        f"recipe.{name} belongs to recipe.quantile = 'sampled', found 'learned'"
      )
