"""PPO on a bandit: the tilted reference, and the value of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.losses import policy_gradient
from alignjax.recipes import ppo as module
from alignjax.recipes.ppo import ppo
from alignjax.step import init_state
from alignjax.system.optimizer import optimizer
from tests.oracles import bandit
from tests.oracles.rl import annealed, exactly, tilt

KL_COEF = 0.5


def recipe_of(*, exact=True, **numbers):
  model = bandit.model()
  numbers = (
    dict(
      kl_coef=KL_COEF, value_coef=1.0, whiten_advantage=False, clip_value=10.0
    )
    | numbers
  )
  recipe = ppo(model, bandit.reward(), max_new_tokens=1, **numbers)
  return exactly(recipe, model, 1) if exact else recipe


def best_value(kl_coef=KL_COEF):
  """E[r - kl_coef log(p / ref)] at the optimum is kl_coef log Z."""
  return kl_coef * np.log(bandit.REF @ np.exp(bandit.REWARD / kl_coef))


def settled(recipe, lr=0.5, steps=120):
  found, state = bandit.run(
    recipe, bandit.natural_gradient(lr), rows=1, steps=steps
  )
  return found, float(state.params['value']['values'][0])


def test_exact_optimum_and_its_value():
  found, value = settled(recipe_of())
  np.testing.assert_allclose(found, tilt(1 / KL_COEF), atol=1e-5)
  np.testing.assert_allclose(value, best_value(), atol=1e-4)


def test_the_configured_optimizer_gets_there_too():
  # The table gives the value role its own learning rate.
  table = (('value/.*', 10.0), ('.*', 1.0))
  tx = optimizer(3000, lr=0.05, schedule='linear', clip_norm=0.0, table=table)
  found, state = bandit.run(recipe_of(), tx, rows=1, steps=3000)
  np.testing.assert_allclose(found, tilt(1 / KL_COEF), atol=1e-5)
  value = float(state.params['value']['values'][0])
  np.testing.assert_allclose(value, best_value(), atol=1e-3)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize(
  'numbers', [{}, {'updates': 2}, {'whiten_advantage': True}]
)
def test_sampled_form(numbers, seed):
  recipe = recipe_of(exact=False, **dict(kl_coef=2.0) | numbers)
  found, _ = bandit.run(
    recipe, annealed(0.25, 0.1), rows=4096, steps=200, seed=seed
  )
  np.testing.assert_allclose(found, tilt(0.5), atol=1e-2)


def test_the_table_freezes_or_slows_the_value_role():
  values = {}
  for factor in (0.0, 1.0, 2.0):
    table = (('value/.*', factor), ('.*', 1.0))
    tx = optimizer(1, algorithm='sgd', b1=0.0, lr=0.1, table=table)
    _, state = bandit.run(recipe_of(clip_high=9.0), tx, rows=1, steps=1)
    values[factor] = float(state.params['value']['values'][0])
  assert values[0.0] == 0 and values[1.0] > 0
  np.testing.assert_allclose(values[2.0], 2 * values[1.0], rtol=1e-5)


def test_a_wrong_sign_is_detected(monkeypatch):
  right = policy_gradient.surrogate
  monkeypatch.setattr(module, 'surrogate', lambda *a, **k: -right(*a, **k))
  found, _ = settled(recipe_of(), lr=0.1, steps=20)
  assert np.abs(found - tilt(1 / KL_COEF)).max() > 0.1


def test_a_missing_stop_gradient_is_detected(monkeypatch):
  # Advantages from the value as it is being trained, without stopping its
  # gradient: the policy's loss then pushes the value away from the return.
  right = recipe_of()

  def leaking(log_ratio, advantage, **_):
    return -jnp.exp(log_ratio) * advantage

  monkeypatch.setattr(module, 'surrogate', leaking)
  broken = recipe_of()

  def objective(bundle, batch, key):
    value = bundle['value']['values'][0]
    live = {'advantage': (batch['returns'] - value) * batch['mask']}
    return broken.objective(bundle, batch | live, key)

  _, value = settled(right)
  _, leaked = settled(broken._replace(objective=objective))
  np.testing.assert_allclose(value, best_value(), atol=1e-4)
  assert abs(leaked - best_value()) > 0.5


def test_a_wrong_baseline_is_detected():
  # A penalty that is left out of the returns is not found by the value.
  right = recipe_of()

  def forgotten(bundle, batch, key):
    batch = right.stages[-1](bundle, batch, key)
    return batch | {'returns': batch['reward'][..., None] * batch['mask']}

  broken = right._replace(stages=(*right.stages[:-1], forgotten))
  found, value = settled(broken)
  assert abs(value - best_value()) > 0.05
  np.testing.assert_allclose(value, found @ bandit.REWARD, atol=1e-3)


def test_the_first_of_two_updates_has_ratio_1():
  recipe = recipe_of(exact=False, updates=2)
  tx = bandit.natural_gradient(0.1)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, bandit.prompts(256), 0)
  loss, metrics = recipe.objective(
    {**state.params, **state.frozen}, batch, jax.random.key(0)
  )
  np.testing.assert_allclose(
    loss['policy_gradient'][1].value, -batch['advantage'].mean(), rtol=1e-5
  )
  assert metrics['logp_drift'].number < 1e-6
  assert metrics['clipped'].number == 0


@pytest.mark.parametrize(
  'numbers, words',
  [
    ({'gamma': 1.5}, 'recipe.gamma: found 1.5, expected a number from 0 to 1'),
    ({'gae_lambda': -1.0}, 'recipe.gae_lambda: found -1, expected a number'),
    ({'clip_value': 0.0}, 'recipe.clip_value: found 0, expected 1e-06 or more'),
    ({'response_count': 0}, 'recipe.response_count: found 0, expected 1'),
    ({'value_coef': -1.0}, 'recipe.value_coef: found -1, expected 0 or more'),
  ],
)
def test_bad_numbers_are_one_sentence(numbers, words):
  with pytest.raises(UserError, match=words.replace('.', r'\.')):
    recipe_of(exact=False, **numbers)
