"""WARP on a bandit: the annealing anchor, and the geometry of LITI."""

import numpy as np
import pytest

from alignjax.recipes.warp import warp
from alignjax.stages.rollout import enumerate_arms
from tests.oracles import bandit

KL_COEF, EMA_RATE = 0.5, 0.01


def tilt(strength):
  """pi_ref exp(strength r) / Z."""
  p = bandit.REF * np.exp(strength * bandit.REWARD)
  return p / p.sum()


def recipe_of(*, exact=True, frozen=False, **numbers):
  model = bandit.model()
  numbers = (
    dict(kl_coef=KL_COEF, ema_rate=EMA_RATE, temperature=1.0)
    | dict(baseline='none' if exact else 'leave_one_out')
    | numbers
  )
  recipe = warp(model, bandit.reward(), max_new_tokens=1, **numbers)
  if frozen:
    recipe = recipe._replace(follow={'anchor': None})
  if exact:
    arms = enumerate_arms([(model.policy('policy'), 1)], arms=5)
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def test_inner_optimum_with_a_fixed_anchor():
  found, _ = bandit.run(
    recipe_of(frozen=True), bandit.natural_gradient(1.0), rows=1, steps=60
  )
  np.testing.assert_allclose(found, tilt(1 / KL_COEF), atol=1e-5)


def test_the_ema_anchor_anneals_the_kl():
  # The natural gradient with rate 1 / kl_coef is at the inner optimum after
  # every step, so the anchor moves by mu r / beta each time.
  golden = [0.000177, 0.002611, 0.028941, 0.178206, 0.790065]
  np.testing.assert_allclose(tilt(2.0), golden, atol=6e-7)
  policies = []
  _, state = bandit.run(
    recipe_of(),
    bandit.natural_gradient(1 / KL_COEF),
    rows=1,
    steps=100,
    watch=lambda state, _: policies.append(state.params['policy']),
  )
  anchor = bandit.probabilities(state.frozen['anchor'])
  np.testing.assert_allclose(anchor, tilt(2.0), atol=1e-5)
  # Before update t + 1: log pi = log ref + (1 + mu t) r / beta + const.
  for t in (0, 50):
    found = bandit.probabilities(policies[t])
    strength = (1 + EMA_RATE * t) / KL_COEF
    np.testing.assert_allclose(found, tilt(strength), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('response_count', [1, 4])
def test_sampled_form(response_count, seed):
  def rate(step):
    return 0.5 / (1 + 0.1 * step)

  found, _ = bandit.run(
    recipe_of(
      exact=False, frozen=True, kl_coef=2.0, response_count=response_count
    ),
    bandit.natural_gradient(rate),
    rows=4096 // response_count,
    steps=200,
    seed=seed,
  )
  np.testing.assert_allclose(found, tilt(0.5), atol=1e-2)


def test_a_wrong_kl_sign_is_detected():
  found, _ = bandit.run(
    recipe_of(frozen=True, kl_coef=-KL_COEF),
    bandit.natural_gradient(0.1),
    rows=1,
    steps=20,
  )
  assert np.abs(found - tilt(1 / KL_COEF)).max() > 0.1


def test_temperature_is_sampled_and_scored_alike():
  # The optimum is that of the tempered policy and anchor.
  temperature = 0.5
  model = bandit.model()
  from alignjax.policies.combine import tempered

  recipe = warp(
    model,
    bandit.reward(),
    kl_coef=1.0,
    max_new_tokens=1,
    temperature=temperature,
    baseline='none',
  )._replace(follow={'anchor': None})
  policy = tempered(model.policy('policy'), temperature)
  arms = enumerate_arms([(policy, 1)], arms=5)
  recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  _, state = bandit.run(recipe, bandit.natural_gradient(0.2), rows=1, steps=600)
  z = np.asarray(state.params['policy']['logits'][0], np.float64)
  found = np.exp(z / temperature) / np.exp(z / temperature).sum()
  anchor = bandit.REF ** (1 / temperature)
  target = anchor * np.exp(bandit.REWARD)
  np.testing.assert_allclose(found, target / target.sum(), atol=1e-5)


def test_leave_one_out_baseline_keeps_the_gradient():
  # The expectation over many seeds of one sampled step equals the exact step.
  exact, _ = bandit.run(
    recipe_of(frozen=True), bandit.natural_gradient(0.1), rows=1, steps=1
  )
  sampled = np.mean(
    [
      bandit.run(
        recipe_of(exact=False, frozen=True, response_count=2),
        bandit.natural_gradient(0.1),
        rows=4096,
        steps=1,
        seed=seed,
      )[0]
      for seed in range(4)
    ],
    axis=0,
  )
  np.testing.assert_allclose(sampled, exact, atol=2e-3)
