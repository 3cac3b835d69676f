"""J-BOND on a bandit: the inner optimum with a frozen anchor, and the drift."""

import jax
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.types import Mean
from alignjax.recipes import jbond as module
from alignjax.recipes.jbond import jbond
from alignjax.stages.rollout import enumerate_arms
from tests.oracles import bandit

UPTO = np.cumsum(bandit.REF)
EXPECTED_REWARD = -np.log(16) * (1 - UPTO) ** 2
BEST_OF_2 = bandit.best_of(bandit.REF, 2)
GOLDEN = {
  0.0: [0.013093, 0.080269, 0.285591, 0.365241, 0.255807],
  1.0: [0.044343, 0.134766, 0.302863, 0.313162, 0.204866],
  2.0: [0.061001, 0.156198, 0.303420, 0.292610, 0.186770],
}


def recipe_of(
  *,
  frozen=True,
  exact=True,
  ref=bandit.REF,
  rewards=bandit.REWARD,
  **numbers,
):
  model = bandit.model(ref)
  numbers = dict(baseline='none' if exact else 'leave_one_out') | numbers
  if frozen:
    numbers |= dict(ema_rate=0.0, anchor_period=0)
  recipe = jbond(model, bandit.reward(rewards), max_new_tokens=1, **numbers)
  if exact:
    draws = [(model.policy('policy'), 1), (model.policy('anchor'), 2)]
    arms = enumerate_arms(draws, arms=len(ref))
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def solve(weight, gamma, ref=bandit.REF, rewards=bandit.REWARD):
  """The optimum of J-BOND with a fixed anchor `ref`, in float64."""
  below, upto = bandit.quantiles(ref, rewards)
  q = ref * np.exp(-np.log(16) * (1 - upto) ** 2)
  return bandit.mixed(
    weight * np.log(q / q.sum()) + gamma * np.log(ref),
    backward=weight + gamma,
    forward=(1 - weight) * (upto**2 - below**2),
  )


def test_golden_expected_rewards():
  golden = [-2.245797, -1.358568, -0.443614, -0.062383, 0]
  np.testing.assert_allclose(EXPECTED_REWARD, golden, atol=6e-7)
  np.testing.assert_allclose(module.LOSS_PENALTY / 4, np.log(2))


def test_backward_only():
  golden = [0.016554, 0.080399, 0.301092, 0.367354, 0.234601]
  target = bandit.REF * np.exp(EXPECTED_REWARD)
  target /= target.sum()
  np.testing.assert_allclose(target, golden, atol=6e-7)
  found, _ = bandit.run(
    recipe_of(jeffreys_weight=1.0),
    bandit.natural_gradient(0.5),
    rows=1,
    steps=100,
  )
  np.testing.assert_allclose(found, target, atol=1e-5)


def test_forward_only():
  found, _ = bandit.run(
    recipe_of(jeffreys_weight=0.0),
    bandit.natural_gradient(0.5),
    rows=1,
    steps=100,
  )
  np.testing.assert_allclose(found, BEST_OF_2, atol=1e-5)


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.0])
def test_mixed_optimum(gamma):
  np.testing.assert_allclose(solve(0.5, gamma), GOLDEN[gamma], atol=6e-7)
  found, _ = bandit.run(
    recipe_of(anchor_kl_coef=gamma),
    bandit.natural_gradient(0.3),
    rows=1,
    steps=200,
  )
  np.testing.assert_allclose(found, solve(0.5, gamma), atol=1e-5)


def test_the_other_sign_of_the_anchor_term_is_detected():
  # The algorithm box's sign: the same objective with gamma = -1.
  right = recipe_of(anchor_kl_coef=1.0)

  def objective(bundle, batch, key):
    loss, metrics = right.objective(bundle, batch, key)
    coefficient, mean = loss['anchor_kl']
    return loss | {'anchor_kl': (-coefficient, mean)}, metrics

  found, _ = bandit.run(
    right._replace(objective=objective),
    bandit.natural_gradient(0.05),
    rows=1,
    steps=4000,
  )
  wrong = [0.001, 0.013, 0.069, 0.135, 0.782]
  np.testing.assert_allclose(found, wrong, atol=1e-3)
  assert np.abs(found - solve(0.5, 1.0)).max() > 0.5


@pytest.mark.parametrize('weight', [0.3, 0.5, 1.0])
@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.0])
def test_mixed_optimum_of_other_numbers(gamma, weight):
  numbers = dict(ref=bandit.OTHER_REF, rewards=bandit.OTHER_REWARD)
  recipe = recipe_of(anchor_kl_coef=gamma, jeffreys_weight=weight, **numbers)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.3), rows=1, steps=250)
  target = solve(weight, gamma, **numbers)
  np.testing.assert_allclose(found, target, atol=1e-5)


def test_the_weight_on_the_wrong_term_is_detected():
  recipe = recipe_of(jeffreys_weight=0.8)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.3), rows=1, steps=200)
  np.testing.assert_allclose(found, solve(0.8, 0.0), atol=1e-5)
  assert np.abs(found - solve(0.2, 0.0)).max() > 5e-3


def test_an_anchor_of_copies_compounds():
  # Forward only, the fixed point is best-of-2 of the anchor: then of that.
  recipe = recipe_of(
    frozen=False, jeffreys_weight=0.0, ema_rate=0.0, anchor_period=60
  )
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.5), rows=1, steps=120)
  np.testing.assert_allclose(found, bandit.best_of(bandit.REF, 4), atol=1e-5)


@pytest.mark.parametrize(
  'numbers, words',
  [
    ({'anchor_period': 50}, 'set one of them to 0'),
    ({'anchor_period': -1, 'ema_rate': 0.0}, 'recipe.anchor_period: found -1'),
    ({'ema_rate': 1.5}, 'recipe.ema_rate: found 1.5, expected a number from 0'),
    ({'anchor_kl_coef': -1.0}, 'recipe.anchor_kl_coef: found -1, expected 0'),
    ({'jeffreys_weight': 1.1}, 'recipe.jeffreys_weight: found 1.1, expected'),
  ],
)
def test_bad_numbers_are_told(numbers, words):
  with pytest.raises(UserError, match=words):
    jbond(bandit.model(), bandit.reward(), **numbers)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sampled_form(seed):
  def rate(step):
    return 0.5 / (1 + 0.1 * step)

  found, _ = bandit.run(
    recipe_of(exact=False, anchor_kl_coef=1.0),
    bandit.natural_gradient(rate),
    rows=2048,
    steps=200,
    seed=seed,
  )
  np.testing.assert_allclose(found, solve(0.5, 1.0), atol=1e-2)


def test_a_moving_anchor_keeps_improving():
  kls, rewards = [], []

  def watch(state, _):
    p = bandit.probabilities(state.params['policy'])
    kls.append(np.sum(p * np.log(p / bandit.REF)))
    rewards.append(p @ bandit.REWARD)

  bandit.run(
    recipe_of(frozen=False, ema_rate=0.02),
    bandit.natural_gradient(0.1),
    rows=1,
    steps=300,
    watch=watch,
  )
  assert np.all(np.diff(rewards) > -1e-6)
  assert rewards[-1] > 3.5
  # Early growth is roughly linear once the policy has caught its anchor.
  early = np.array(kls[40:140])
  line = np.polyval(np.polyfit(np.arange(100), early, 1), np.arange(100))
  assert np.abs(early - line).max() < 0.1 * early.max()


def test_gradient_does_not_flow_through_the_log_ratio():
  # At pi = anchor the log-ratio is 0: without a stop-gradient its derivative
  # would still move the policy when all rewards are equal.
  model = bandit.model()
  recipe = jbond(
    model,
    bandit.reward(np.zeros(5)),
    max_new_tokens=1,
    jeffreys_weight=1.0,
    anchor_kl_coef=1.0,
    baseline='none',
  )
  draws = [(model.policy('policy'), 1), (model.policy('anchor'), 2)]
  recipe = recipe._replace(
    stages=(enumerate_arms(draws, arms=5), *recipe.stages[1:])
  )
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.5), rows=1, steps=20)
  np.testing.assert_allclose(found, bandit.REF, atol=1e-6)


def test_a_missing_stop_gradient_is_detected():
  # 2 (log ratio) grad log pi instead of once: the pull is twice as strong.
  right = recipe_of(anchor_kl_coef=1.0)

  def objective(bundle, batch, key):
    loss, metrics = right.objective(bundle, batch, key)
    logits = jax.nn.log_softmax(bundle['policy']['logits'][0])
    ref_logp = batch['ref_logp'][:, 0].sum(-1)
    logp = logits[batch['response'][:, 0, 0]]
    live = Mean.of(logp * (logp - ref_logp), batch['weight'][:, 0])
    return loss | {'anchor_kl': (1.0, live)}, metrics

  tx = bandit.natural_gradient(0.1)
  found, _ = bandit.run(right, tx, rows=1, steps=300)
  broken = right._replace(objective=objective)
  leaked, _ = bandit.run(broken, tx, rows=1, steps=300)
  np.testing.assert_allclose(found, solve(0.5, 1.0), atol=1e-5)
  assert np.abs(leaked - solve(0.5, 1.0)).max() > 5e-3


def test_microbatches_change_nothing():
  results = [
    bandit.run(
      recipe_of(exact=False),
      bandit.natural_gradient(0.2),
      rows=64,
      steps=5,
      microbatches=m,
    )[0]
    for m in (1, 4)
  ]
  np.testing.assert_allclose(*results, atol=4e-6)
