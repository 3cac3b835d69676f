"""WARP on a bandit: the annealing anchor, and the geometry of LITI."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import Follow
from alignjax.merge.memory import merge
from alignjax.recipes.warp import warp
from alignjax.stages.rollout import enumerate_arms
from alignjax.step import init_state, make_step
from tests.oracles import bandit
from tests.oracles.rl import tilt

KL_COEF, EMA_RATE = 0.5, 0.01


def recipe_of(
  *,
  exact=True,
  frozen=False,
  ref=bandit.REF,
  rewards=bandit.REWARD,
  **numbers,
):
  model = bandit.model(ref)
  numbers = (
    dict(kl_coef=KL_COEF, ema_rate=EMA_RATE, temperature=1.0)
    | dict(baseline='none' if exact else 'leave_one_out')
    | numbers
  )
  recipe = warp(model, bandit.reward(rewards), max_new_tokens=1, **numbers)
  if frozen:
    recipe = recipe._replace(follow={'anchor': None})
  if exact:
    draws = [(model.policy('policy'), 1)]
    arms = enumerate_arms(draws, arms=len(ref))
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


def test_the_anchor_anneals_other_numbers_alike():
  ref, rewards = bandit.OTHER_REF, bandit.OTHER_REWARD / 5
  kl_coef, ema_rate, steps = 2.0, 0.04, 50
  recipe = recipe_of(
    ref=ref, rewards=rewards, kl_coef=kl_coef, ema_rate=ema_rate
  )
  found, state = bandit.run(
    recipe, bandit.natural_gradient(1 / kl_coef), rows=1, steps=steps
  )
  anchor = bandit.probabilities(state.frozen['anchor'])
  target = tilt(ema_rate * steps / kl_coef, ref, rewards)
  np.testing.assert_allclose(anchor, target, atol=1e-5)
  target = tilt((1 + ema_rate * (steps - 1)) / kl_coef, ref, rewards)
  np.testing.assert_allclose(found, target, atol=1e-5)


def test_an_anchor_that_moves_before_the_policy_is_detected():
  # The average of where the policy was: one step late.
  right = recipe_of(ema_rate=0.2)
  late, before = {}, {}

  def lag(step, leader, me):
    del step
    return tree.lerp(me, before['policy'], 0.2)

  broken = right._replace(follow={'anchor': Follow('policy', lag)})
  tx = bandit.natural_gradient(1 / KL_COEF)
  state = init_state(broken, tx, 0)
  for k in range(3):
    before['policy'] = state.params['policy']  # a constant of the step below
    batch = train.stage_batch(broken, state, bandit.prompts(1), 0)
    state, _ = make_step(broken, tx)(state, batch)
    late[k] = bandit.probabilities(state.frozen['anchor'])
  _, state = bandit.run(right, tx, rows=1, steps=3)
  found = bandit.probabilities(state.frozen['anchor'])
  np.testing.assert_allclose(found, tilt(3 * 0.2 / KL_COEF), atol=1e-5)
  assert np.abs(late[2] - found).max() > 0.1


def liti_path(ref, direction, rate):
  """Probabilities at `rate` from log ref towards log ref + direction."""
  init = {'logits': jnp.asarray(np.log(ref)[None], jnp.float32)}
  end = {'logits': init['logits'] + jnp.asarray(direction, jnp.float32)}
  merged = merge('liti', base=init, models=[end], liti_rate=rate)
  return bandit.probabilities(merged)


@pytest.mark.parametrize(
  'ref, direction',
  [
    (bandit.REF, bandit.REWARD),
    (bandit.OTHER_REF, np.array([0.5, 1.0, -0.7, 0.2])),
  ],
)
def test_liti_of_logits_is_the_geometric_path(ref, direction):
  ends = [liti_path(ref, direction, rate) for rate in (0.0, 1.0)]
  kl_end = np.sum(ends[1] * np.log(ends[1] / ref))
  for rate in (0.1, 0.3, 0.5, 0.8):
    found = liti_path(ref, direction, rate)
    target = ends[0] ** (1 - rate) * ends[1] ** rate
    np.testing.assert_allclose(found, target / target.sum(), atol=1e-6)
    # Convex in KL, concave in what the task vector gains, at such tilts.
    assert np.sum(found * np.log(found / ref)) < rate * kl_end
    chord = (1 - rate) * ends[0] @ direction + rate * ends[1] @ direction
    assert found @ direction > chord


def test_golden_liti_path():
  kls = {0.1: 0.0071, 0.3: 0.0609, 0.5: 0.1587, 0.8: 0.3587, 1.0: 0.5083}
  above = {0.1: 0.028, 0.3: 0.072, 0.5: 0.090, 0.8: 0.060, 1.0: 0.0}
  end = liti_path(bandit.REF, bandit.REWARD, 1.0)
  for rate, kl in kls.items():
    found = liti_path(bandit.REF, bandit.REWARD, rate)
    measured = np.sum(found * np.log(found / bandit.REF))
    np.testing.assert_allclose(measured, kl, atol=6e-5)
    chord = (1 - rate) * bandit.REF + rate * end
    gain = (found - chord) @ bandit.REWARD
    np.testing.assert_allclose(gain, above[rate], atol=6e-4)
  # A strong tilt saturates, and its path is no longer below the chord in KL.
  strong = [liti_path(bandit.REF, 3 * bandit.REWARD, r) for r in (0.5, 1.0)]
  half, whole = (np.sum(p * np.log(p / bandit.REF)) for p in strong)
  np.testing.assert_allclose(half / (0.5 * whole), 1.12, atol=6e-3)


@pytest.mark.parametrize('degrees', [90.0, 40.0])
def test_lerp_shortens_what_slerp_keeps(degrees):
  angle, length = np.radians(degrees), 2.5
  vectors = length * np.array(
    [[1.0, 0.0, 0.0], [np.cos(angle), np.sin(angle), 0.0]]
  )
  base = jnp.asarray([7.0, -3.0, 2.0])
  models = [{'w': base + jnp.asarray(v, jnp.float32)} for v in vectors]
  for t in (0.5, 0.2):
    norms = {
      method: np.linalg.norm(
        merge(method, base={'w': base}, models=models, t=t)['w'] - base
      )
      for method in ('slerp', 'linear')
    }
    shorter = np.sqrt(1 - 2 * (1 - np.cos(angle)) * (t - t**2))
    np.testing.assert_allclose(norms['slerp'], length, rtol=1e-5)
    np.testing.assert_allclose(norms['linear'], length * shorter, rtol=1e-5)


def test_a_bad_rate_is_told():
  with pytest.raises(UserError, match='recipe.ema_rate: found 2, expected'):
    warp(bandit.model(), bandit.reward(), ema_rate=2.0)


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
