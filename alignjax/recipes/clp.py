"""Conditional Language Policy: one model for every trade-off (2407.15762).

Rewards R_1 .. R_m are weighed by w on the simplex, KL to the reference by
alpha. Each step draws (alpha, w) for each group of rows; the policy with its
weights mixed for them maximises

  (1 - alpha) w.R(y) - alpha log(pi(y) / reference(y)),

so that what is trained is the mixture and not its ends, which is what rewarded
soups mix. `copied` says which leaves exist m times: 'full', 'attention',
'logits' (the last layer, which unties a tied table) or a regex. Where
kl_coef_low < kl_coef_high, alpha is a condition too and the reference is one
more endpoint:

  theta(alpha, w) = (1 - k) reference + k sum_i w_i theta_i,
  k = c(alpha) / c(kl_coef_low),  c(a) = (1 - a) / a.

`condition` holds what is mixed: w, or (k w, 1 - k). Copies start equal. Rewards
of different scales are for the reward to standardise; raw means are logged, and
`own/NAME` is that of an objective under its own weight: above `reward/NAME`,
the policy is steered.

Deviations from the paper, whose text was not at hand: k above makes mixed
logits exactly optimal at every alpha, which alpha itself as the reference's
weight does not; the baseline is the mean return of a prompt's other responses;
a soft cap on the logits applies to their mixture. Policy and reference are
scored as they are sampled: at a temperature, truncated. What truncation keeps
is that of the mixture, so it differs from one (alpha, w) to another.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from alignjax.core.errors import UserError
from alignjax.core.types import (
  Mean,
  Mixed,
  Model,
  Recipe,
  Reward,
  Stage,
)
from alignjax.losses.logprob import token_scores
from alignjax.losses.policy_gradient import reinforce
from alignjax.policies import conditioned
from alignjax.policies.combine import sampled
from alignjax.stages import arrange
from alignjax.stages import groups as grouping
from alignjax.stages.overlap import overlap
from alignjax.stages.rollout import rollout
from alignjax.stages.score import names, reference, score, summary


def clp(
  model: Model,
  reward: Reward,
  *,
  objectives: Sequence[str] = (),
  copied: str = 'full',
  concentration: float = 1.0,
  kl_coef_low: float = 0.1,
  kl_coef_high: float = 0.1,
  groups: int = 4,
  response_count: int = 2,
  max_new_tokens: int = 64,
  rollout_chunks: int = 1,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  baseline: str = 'leave_one_out',
) -> Recipe:
  """CLP; `objectives` are names of the reward's scores, w in their order.

  w is Dirichlet(`concentration`), alpha uniform between the two kl_coef.
  Raises UserError for numbers out of range and scores that there are not.
  """
  arrange.check_baseline(baseline)
  check(concentration, kl_coef_low, kl_coef_high, groups)
  vary = kl_coef_high > kl_coef_low
  columns = chosen(reward, objectives, least=1 if vary else 2)
  policy = conditioned.conditioned(model.policy, 'policy', reference=vary)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(policy)
  draw_responses = rollout(
    [(policy, response_count)],
    max_new_tokens=max_new_tokens,
    stop=model.stop,
    pad=model.pad,
  )
  returns = scalarised(columns, kl_coef_low, vary, baseline)
  last = [conditioned.REFERENCE] if vary else []

  def copies(params):
    return conditioned.split(params, len(columns), copied)

  def draw(key):
    w = jax.random.dirichlet(
      jax.random.fold_in(key, 0), jnp.full(len(columns), concentration)
    )
    alpha = jax.random.uniform(
      jax.random.fold_in(key, 1), (), jnp.float32, kl_coef_low, kl_coef_high
    )
    return mixing(w, alpha, kl_coef_low, vary)

  def objective(bundle, batch, key):
    del key
    logp, entropy = grouping.over(
      lambda rows: token_scores(policy, policy.view(bundle, rows), rows),
      batch,
      groups,
    )
    loss = Mean.of(reinforce(logp, batch['advantage']), batch['weight'])
    metrics = summary(batch, logp, entropy, names=names(reward), kl='kl')
    w, alpha = meaning(batch['condition'], kl_coef_low, vary)
    out = {**metrics, 'kl_coef': Mean.of(alpha, jnp.ones_like(alpha))}
    own = steering(batch, objectives, columns, w)
    return {'policy_gradient': (1.0, loss)}, {**out, **own}

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'reference': model.init},
    follow={'reference': None},
    mixed={'policy': Mixed(copies, (*objectives, *last))},
    stages=(
      grouping.write(draw, groups),
      *overlap(
        grouping.grouped(draw_responses, groups),
        score(reward),
        chunks=rollout_chunks,
      ),
      reference(as_drawn(model.policy('reference'))),
      # By group: a single response's others have its weights.
      grouping.grouped(returns, groups),
    ),
  )


def told(
  model: Model,
  reward: Reward,
  *,
  objectives: Sequence[str] = (),
  kl_coef: float = 0.1,
  response_count: int = 2,
  max_new_tokens: int = 64,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> Recipe:
  """The baseline: the weights of `condition` are words of the prompt.

  A plain policy on the source `weighted`; rewards and reference read the
  prompt without the words. KL strength is fixed.
  """
  check(1.0, kl_coef, kl_coef, 1)
  arrange.check_numbers(response_count=(response_count, 2, math.inf))
  columns = chosen(reward, objectives, least=2)
  as_drawn = partial(sampled, temperature=temperature, top_k=top_k, top_p=top_p)
  policy = as_drawn(model.policy('policy'))
  fixed = as_drawn(model.policy('reference'))

  def bare(stage):
    def on(bundle, batch, key):
      if batch.get('condition', jnp.zeros((1, 0))).shape[1] != len(columns):
        raise UserError(
          'recipe clp.told: rows without a weight for each of '
          f'{list(objectives)}, expected the source weighted with count = '
          f'{len(columns)}'
        )
      plain = batch | {'prompt': batch['plain_prompt']}
      return stage(bundle, plain, key) | {'prompt': batch['prompt']}

    return on

  def objective(bundle, batch, key):
    del key
    logp, entropy = token_scores(policy, policy.view(bundle, batch), batch)
    loss = Mean.of(reinforce(logp, batch['advantage']), batch['weight'])
    metrics = summary(batch, logp, entropy, names=names(reward), kl='kl')
    w = batch['condition']
    own = steering(batch, objectives, columns, w)
    return {'policy_gradient': (1.0, loss)}, {**metrics, **own}

  return Recipe(
    objective=objective,
    init={'policy': model.init, 'reference': model.init},
    follow={'reference': None},
    stages=(
      rollout(
        [(policy, response_count)],
        max_new_tokens=max_new_tokens,
        stop=model.stop,
        pad=model.pad,
      ),
      bare(score(reward)),
      bare(reference(fixed)),
      scalarised(columns, kl_coef, False, 'leave_one_out'),
    ),
  )


def scalarised(columns, lowest: float, vary: bool, baseline: str) -> Stage:
  """A stage: reward = w.R, and the advantage of (1 - a) w.R - a log ratio."""

  @jax.jit
  def stage(bundle, batch, key):
    del bundle, key
    w, alpha = meaning(batch['condition'], lowest, vary)
    own = batch['rewards'][..., jnp.array(columns)]
    scalar = jnp.einsum('bnk,bk->bn', own, w)
    log_ratio = jnp.sum(batch['sample_logp'] - batch['ref_logp'], axis=-1)
    total = (1 - alpha) * scalar - alpha * log_ratio
    return batch | {
      'reward': scalar,
      'advantage': arrange.advantage(total, batch, baseline=baseline),
    }

  return stage


def steering(batch, objectives, columns, w) -> dict[str, Mean]:
  """Raw means of the objectives, plain and under their own weights."""
  out = {}
  for i, (name, column) in enumerate(zip(objectives, columns)):
    raw = batch['rewards'][..., column]
    out[f'reward/{name}'] = Mean.of(raw, batch['weight'])
    out[f'own/{name}'] = Mean.of(raw, batch['weight'] * w[:, i, None])
  return out


def mixing(w, alpha, lowest: float, vary: bool):
  """(w [m], alpha) -> condition [K]."""
  if not vary:
    return w
  k = (1 - alpha) / alpha * lowest / (1 - lowest)
  return jnp.append(k * w, 1 - k)


def meaning(condition, lowest: float, vary: bool):
  """condition [B, K] -> (w [B, m], alpha [B, 1]); `mixing` inverted."""
  if not vary:
    return condition, jnp.full((len(condition), 1), lowest)
  k = jnp.sum(condition[:, :-1], axis=1, keepdims=True)
  return condition[:, :-1] / k, 1 / (1 + k * (1 - lowest) / lowest)


def chosen(
  reward: Reward, objectives: Sequence[str], least: int = 1
) -> list[int]:
  """Which scores of the reward the objectives are; at `least` so many."""
  known = names(reward)
  wrong = [name for name in objectives if name not in known]
  if wrong or not objectives or len(set(objectives)) < len(objectives):
    raise UserError(
      f'recipe.objectives: found {list(objectives)}, expected different names '
      f'of the scores of the reward: {list(known)}'
    )
  if len(objectives) < least:
    raise UserError(
      'recipe.objectives: found one and a single kl_coef, expected two or more '
      'objectives or kl_coef_low < kl_coef_high: nothing to condition on'
    )
  return [known.index(name) for name in objectives]


def check(concentration, low, high, groups) -> None:
  """UserError unless (alpha, w) can be drawn; alpha = 1 has no w."""
  arrange.check_numbers(
    concentration=(concentration, 1e-3, math.inf),
    kl_coef_low=(low, 1e-6, 1 - 1e-6),
    kl_coef_high=(high, low, 1 - 1e-6),
    groups=(groups, 1, math.inf),
  )
