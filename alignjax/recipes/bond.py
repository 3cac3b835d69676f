"""BOND: distilling best-of-n of an anchor (arXiv 2407.14622, sections 3, 4).

The target is the distribution of the best of n anchor responses. Forward KL:
imitate the best of n draws. Backward KL: a policy gradient with reward
log p_<=(y), the quantile of y's reward among anchor responses to the same
prompt, and KL strength 1 / (n - 1).

The quantile is counted among `quantile_count` further draws, or with
`quantile='learned'` told by a classifier: a second trained role, `quantile`,
the same net with a scalar head that reads prompt and response. It is fitted at
the same time to 1{r(y') <= r(y)} of one anchor draw y' (of `quantile_count`).
`start.quantile` may be '@policy', or a model directory with such a head or
without one.

The anchor stays the reference, is replaced by the policy every `anchor_period`
steps (iterative BOND, n = 2 or 4), or follows it as a moving average of
`ema_rate`.

Deviations from the paper: counted quantiles are kept from 0 by
`quantile_floor` (default 1 / (quantile_count + 1), the least that so many draws
can resolve). The paper leaves out the reward's second term in practice;
`discrete_correction` adds it, which makes best-of-n the exact optimum for
discrete rewards. Policy and anchor are scored as they are sampled: at a
temperature, truncated.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from alignjax.core import follow
from alignjax.core.errors import UserError
from alignjax.core.types import (
  Batch,
  Bundle,
  Loss,
  Mean,
  Model,
  Recipe,
  Reward,
)
from alignjax.losses.calibration import quantile as quantile_of
from alignjax.losses.calibration import quantile_nll
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.losses.value import of_response
from alignjax.policies.combine import sampled
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
  top_k: int = 0,
  top_p: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """BOND towards best-of-n; equations 9 to 12 and algorithm 1.

  quantile_count: by default 16 draws to count, or 1 to learn from.
  Raises UserError for numbers out of range and what learning cannot have.
  """
  _check(n, jeffreys_weight, baseline)
  if quantile == 'sampled':
    count = 16 if quantile_count is None else quantile_count
    told = _counted(count, quantile_floor)
  else:
    count = 1 if quantile_count is None else quantile_count
    told = _learned(model, quantile, quantile_floor, discrete_correction)
  arrange.check_numbers(quantile_count=(count, 1, math.inf))
  moving = follow.anchor(anchor_period=anchor_period, ema_rate=ema_rate)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(model.policy('policy'))
  anchor = as_drawn(model.policy('anchor'))

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
    log_p = told.log(bundle, arrange.first(batch, 1), upto)
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
    added = [jnp.broadcast_to(x, (len(x), 2)) for x in (upto, log_p)]
    return batch | {
      'advantage': jnp.concatenate([advantage, zeros], axis=1),
      'rewards': jnp.concatenate(
        [batch['rewards'], jnp.stack(added, axis=-1)], axis=-1
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
    } | told.loss(bundle, y, y['rewards'][..., -2])
    metrics = summary(y, logp[:, :1], entropy[:, :1], names=names(reward))
    return loss, {
      **metrics,
      'log_quantile': Mean.of(batch['rewards'][:, 0, -1], weight[:, 0]),
      'best_reward': Mean.of(batch['reward'][:, 1], weight[:, 1]),
    }

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'anchor': model.init} | told.init,
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


class _Quantile(NamedTuple):
  """Who tells log p_<=.

  Attributes:
    init: the roles that this takes.
    log: (bundle, the policy's own responses, share p_<= of the draws) ->
      log p_<= [B, 1].
    loss: the same arguments -> what is to be learned, {} for nothing.
  """

  init: dict[str, Callable]
  log: Callable[[Bundle, Batch, Array], Array]
  loss: Callable[[Bundle, Batch, Array], Loss]


def _counted(count: int, floor: float | None) -> _Quantile:
  least = 1 / (count + 1) if floor is None else floor
  return _Quantile(
    init={},
    log=lambda bundle, own, upto: jnp.log(jnp.maximum(upto, least)),
    loss=lambda bundle, own, upto: {},
  )


def _learned(
  model: Model, word: str, floor: float | None, correction: bool
) -> _Quantile:
  """A classifier, which knows p_<= only and never says 0."""
  arrange.check_choice('quantile', word, ('sampled', 'learned'))
  given = {
    'quantile_floor': floor is not None,
    'discrete_correction': correction,
  }
  for name in (name for name, found in given.items() if found):
    raise UserError(
      f"recipe.{name} belongs to recipe.quantile = 'sampled', found 'learned'"
    )
  scalar = model.scalar('quantile')

  def log(bundle, own, upto):
    del upto
    return jax.nn.log_sigmoid(of_response(scalar, bundle, own))

  def loss(bundle, own, upto):
    logit = of_response(scalar, bundle, own)
    return {
      'quantile': (1.0, Mean.of(quantile_nll(logit, upto), own['weight']))
    }

  return _Quantile({'quantile': model.scalar_init}, log, loss)


def _check(n: int, jeffreys_weight: float, baseline: str) -> None:
  arrange.check_baseline(baseline)
  arrange.check_numbers(jeffreys_weight=(jeffreys_weight, 0, 1))
  if n < 2:
    raise UserError(f'recipe.n: best of {n} is no target; expected 2 or more')
