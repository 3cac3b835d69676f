"""RLOO on a bandit: the tilted reference, wherever the KL is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.losses import policy_gradient
from alignjax.recipes import reinforce as module
from alignjax.recipes.reinforce import reinforce
from alignjax.stages import arrange
from alignjax.step import init_state
from tests.oracles import bandit
from tests.oracles.rl import annealed, exactly, tilt

KL_COEF = 0.5


def recipe_of(*, exact=True, rewards=bandit.REWARD, **numbers):
  model = bandit.model()
  numbers = dict(kl_coef=KL_COEF, response_count=2) | numbers
  recipe = reinforce(model, bandit.reward(rewards), max_new_tokens=1, **numbers)
  if exact:
    recipe = exactly(recipe, model, numbers['response_count'])
  return recipe


def settled(recipe, lr=0.5, steps=120):
  return bandit.run(recipe, bandit.natural_gradient(lr), rows=1, steps=steps)[0]


@pytest.mark.parametrize('response_count', [2, 3])
@pytest.mark.parametrize('kl_in', ['reward', 'loss'])
def test_exact_optimum_is_the_tilted_reference(kl_in, response_count):
  found = settled(recipe_of(kl_in=kl_in, response_count=response_count))
  np.testing.assert_allclose(found, tilt(1 / KL_COEF), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize(
  'numbers',
  [
    {'kl_in': 'reward'},
    {'kl_in': 'loss'},
    {'kl_in': 'reward', 'response_count': 4, 'updates': 2},
  ],
)
def test_sampled_form(numbers, seed):
  recipe = recipe_of(exact=False, **dict(kl_coef=2.0) | numbers)
  rows = 4096 // numbers.get('response_count', 2)
  found, _ = bandit.run(
    recipe, annealed(0.25, 0.1), rows=rows, steps=200, seed=seed
  )
  np.testing.assert_allclose(found, tilt(0.5), atol=1e-2)


# Truncation keeps the three arms in the middle, wherever the tilt takes them.
WIDE = np.array([0.05, 0.3, 0.3, 0.3, 0.05])


def truncated_recipe(**numbers):
  return reinforce(
    bandit.model(WIDE),
    bandit.reward(),
    max_new_tokens=1,
    kl_coef=2.0,
    **numbers,
  )


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('numbers', [{'top_k': 3}, {'top_p': 0.88}])
def test_truncated_sampling_tilts_what_it_keeps(numbers, seed):
  seen = []
  found, _ = bandit.run(
    truncated_recipe(**numbers),
    annealed(0.25, 0.1),
    rows=2048,
    steps=200,
    seed=seed,
    watch=lambda state, metrics: seen.append(metrics['logprob_gap'].number),
  )
  kept = found[1:4] / found[1:4].sum()
  want = tilt(0.5, WIDE, bandit.REWARD)[1:4]
  np.testing.assert_allclose(kept, want / want.sum(), atol=1e-2)
  # What cannot be drawn is neither rewarded nor punished.
  np.testing.assert_allclose(found[0], found[4], rtol=1e-5)
  assert max(seen) < 1e-5


def test_scoring_another_distribution_than_the_sampled_is_detected():
  drawn, scored = truncated_recipe(top_k=3), truncated_recipe()
  mixed = scored._replace(stages=(drawn.stages[0], *scored.stages[1:]))
  seen = []
  bandit.run(
    mixed,
    annealed(0.25, 0.1),
    rows=2048,
    steps=100,
    watch=lambda state, metrics: seen.append(metrics['logprob_gap'].number),
  )
  assert seen[0] > 0.1


def test_a_wrong_sign_is_detected(monkeypatch):
  right = policy_gradient.surrogate
  monkeypatch.setattr(module, 'surrogate', lambda *a, **k: -right(*a, **k))
  found = settled(recipe_of(), lr=0.1, steps=20)
  assert np.abs(found - tilt(1 / KL_COEF)).max() > 0.1


@pytest.mark.parametrize(
  'baseline',
  [
    # A mean that counts the response itself halves the reward.
    lambda r, w: jnp.broadcast_to(r.mean(1, keepdims=True), r.shape),
    # One that looks at the response is no baseline at all.
    lambda r, w: jnp.maximum(r, policy_gradient.leave_one_out(r, w)),
  ],
)
def test_a_wrong_baseline_is_detected(monkeypatch, baseline):
  # With the KL in the reward all returns are equal at the optimum, whatever is
  # subtracted; with the KL in the loss the baseline shows.
  monkeypatch.setattr(arrange, 'leave_one_out', baseline)
  found = settled(recipe_of(kl_in='loss'))
  assert np.abs(found - tilt(1 / KL_COEF)).max() > 1e-2


@pytest.mark.parametrize('name', ['k1', 'k3'])
def test_another_estimator_is_detected(monkeypatch, name):
  # k1 pulls nowhere, k3 towards another optimum.
  monkeypatch.setattr(module, 'k2', getattr(policy_gradient, name))
  found = settled(recipe_of(kl_in='loss'))
  assert not np.abs(found - tilt(1 / KL_COEF)).max() < 1e-2


def test_the_first_of_two_updates_has_ratio_1():
  recipe = recipe_of(exact=False, updates=2)
  tx = bandit.natural_gradient(0.1)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, bandit.prompts(256), 0)
  bundle = {**state.params, **state.frozen}
  loss, metrics = recipe.objective(bundle, batch, jax.random.key(0))
  # Every ratio is 1: the loss is minus the mean advantage, nothing is clipped.
  mean = float(batch['advantage'].mean())
  np.testing.assert_allclose(loss['policy_gradient'][1].value, -mean, atol=1e-6)
  assert metrics['logp_drift'].number < 1e-6
  assert metrics['clipped'].number == 0
  assert 'logprob_gap' not in metrics
  seen = []
  bandit.run(
    recipe, tx, rows=256, steps=1, watch=lambda state, m: seen.append(m)
  )
  assert seen[0]['logp_drift'].number > 1e-3  # of the second


def test_equal_rewards_teach_nothing():
  seen = []
  found, _ = bandit.run(
    recipe_of(exact=False, rewards=np.full(5, 0.1), kl_coef=0.0),
    bandit.natural_gradient(0.5),
    rows=64,
    steps=3,
    watch=lambda state, metrics: seen.append(metrics['flat_groups'].number),
  )
  assert seen == [1, 1, 1]
  np.testing.assert_allclose(found, bandit.REF, atol=1e-6)


@pytest.mark.parametrize(
  'numbers, words',
  [
    ({'response_count': 1}, 'recipe.response_count: found 1, expected 2'),
    ({'kl_in': 'prior'}, "recipe.kl_in: found 'prior', expected one of"),
    ({'clip_low': 1.5}, 'recipe.clip_low: found 1.5, expected a number from'),
    ({'clip_high': 0.0}, 'recipe.clip_high: found 0, expected 1e-06 or more'),
    ({'kl_coef': -0.1}, 'recipe.kl_coef: found -0.1, expected 0 or more'),
    ({'kl_coef': float('nan')}, 'recipe.kl_coef: found nan'),
    ({'updates': 0}, 'recipe.updates: found 0, expected 1 or more'),
    ({'temperature': 0.0}, 'recipe.temperature: found 0'),
    ({'top_p': 0.0}, 'top_p = 0: expected more than 0'),
    ({'top_k': -1}, 'top_k = -1 and top_p = 1: expected'),
  ],
)
def test_bad_numbers_are_one_sentence(numbers, words):
  with pytest.raises(UserError, match=words.replace('.', r'\.')):
    recipe_of(exact=False, **numbers)


def test_rows_that_do_not_split_are_one_sentence():
  with pytest.raises(UserError, match='10 rows does not split into recipe.upd'):
    bandit.run(
      recipe_of(exact=False, updates=3),
      bandit.natural_gradient(0.1),
      rows=10,
      steps=1,
    )
