"""J-BOND on a bandit: the inner optimum with a frozen anchor, and the drift."""

import numpy as np
import pytest
from scipy.special import lambertw

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


def recipe_of(*, frozen=True, exact=True, **numbers):
  model = bandit.model()
  numbers = dict(baseline='none' if exact else 'leave_one_out') | numbers
  recipe = jbond(model, bandit.reward(), max_new_tokens=1, **numbers)
  if frozen:
    recipe = recipe._replace(follow={'anchor': None})
  if exact:
    draws = [(model.policy('policy'), 1), (model.policy('anchor'), 2)]
    arms = enumerate_arms(draws, arms=5)
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def solve(weight, gamma):
  """The mixed optimum, per arm by Lambert W, in float64."""
  q = bandit.REF * np.exp(EXPECTED_REWARD)
  q /= q.sum()
  a, c = weight + gamma, (1 - weight) * BEST_OF_2

  def policy(lam):
    s = lam + weight * np.log(q) + gamma * np.log(bandit.REF)
    return c / (a * lambertw(c / a * np.exp(-s / a)).real)

  low, high = -50.0, 50.0
  for _ in range(200):
    middle = (low + high) / 2
    low, high = (middle, high) if policy(middle).sum() < 1 else (low, middle)
  return policy(low)


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
  found, _ = bandit.run(
    recipe_of(anchor_kl_coef=-1.0),
    bandit.natural_gradient(0.05),
    rows=1,
    steps=4000,
  )
  wrong = [0.001, 0.013, 0.069, 0.135, 0.782]
  np.testing.assert_allclose(found, wrong, atol=1e-3)
  assert np.abs(found - solve(0.5, 1.0)).max() > 0.5


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
