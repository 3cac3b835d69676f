"""GRPO on a bandit: where rewards, groups and the k3 pull are in balance.

With advantages a(y) whose policy mean is 0 and a k3 pull of strength b, the
gradient of logit y is p a - b (p - ref), so that p = ref / (1 - a / b) where
nothing moves (arXiv 2502.18548 derives the same alignment).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Mean
from alignjax.losses import policy_gradient
from alignjax.recipes import grpo as module
from alignjax.recipes.grpo import grpo
from alignjax.step import init_state, make_step
from tests.oracles import bandit
from tests.oracles.rl import annealed, exactly, tilt

KL_COEF = 2.0


def recipe_of(
  *, exact=True, rewards=bandit.REWARD, max_new_tokens=1, **numbers
):
  model = bandit.model()
  numbers = dict(kl_coef=KL_COEF, response_count=2) | numbers
  recipe = grpo(
    model, bandit.reward(rewards), max_new_tokens=max_new_tokens, **numbers
  )
  if exact:
    recipe = exactly(recipe, model, numbers['response_count'])
  return recipe


def without_division(n, kl_coef=KL_COEF):
  """a(y) = c (r - mean of r), c = (n - 1) / n: one equation for the mean."""
  c = (n - 1) / n

  def p(mean):
    return bandit.REF * kl_coef / (kl_coef - c * (bandit.REWARD - mean))

  top = bandit.REWARD.max() - kl_coef / c  # above it every p is positive
  root = optimize.brentq(
    lambda mean: p(mean).sum() - 1, max(top, 0) + 1e-9, 4, xtol=1e-14
  )
  np.testing.assert_allclose(p(root) @ bandit.REWARD, root, atol=1e-9)
  return p(root)


def with_division(n, kl_coef=KL_COEF, epsilon=1e-4):
  """The fixed point of p = ref / (1 - a(p) / b), a by enumeration."""
  groups = np.array(list(itertools.product(range(5), repeat=n)))
  r = bandit.REWARD[groups]
  own = (r[:, 0] - r.mean(1)) / (r.std(1, ddof=1) + epsilon)
  p = bandit.REF
  for _ in range(500):
    others = p[groups[:, 1:]].prod(1)
    a = np.bincount(groups[:, 0], others * own)
    new = bandit.REF / (1 - a / kl_coef)
    p = 0.7 * p + 0.3 * new / new.sum()
  np.testing.assert_allclose(new.sum(), 1, atol=1e-9)
  np.testing.assert_allclose(p @ a, 0, atol=1e-9)
  return p


def settled(recipe, lr=0.2, steps=400):
  return bandit.run(recipe, bandit.natural_gradient(lr), rows=1, steps=steps)[0]


@pytest.mark.parametrize('ratio_of', ['token', 'sequence'])
@pytest.mark.parametrize('n', [2, 3])
def test_exact_optimum_without_division(n, ratio_of):
  found = settled(
    recipe_of(response_count=n, divide_by_std=False, ratio_of=ratio_of)
  )
  np.testing.assert_allclose(found, without_division(n), atol=1e-5)
  # Neither the tilted reference nor what a baseline of all others would give.
  assert np.abs(found - tilt(1 / KL_COEF)).max() > 0.02


@pytest.mark.parametrize('n', [2, 3])
def test_exact_optimum_with_division(n):
  found = settled(recipe_of(response_count=n))
  np.testing.assert_allclose(found, with_division(n), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize(
  'numbers',
  [
    dict(divide_by_std=False),
    dict(response_count=4, updates=2, ratio_of='sequence'),
    dict(response_count=4, mean_over='token', clip_high=0.28),
  ],
)
def test_sampled_form(numbers, seed):
  n = numbers.get('response_count', 2)
  found, _ = bandit.run(
    recipe_of(exact=False, **numbers),
    annealed(0.25, 0.1),
    rows=4096 // n,
    steps=200,
    seed=seed,
  )
  divided = numbers.get('divide_by_std', True)
  target = with_division(n) if divided else without_division(n)
  np.testing.assert_allclose(found, target, atol=1e-2)


def test_a_wrong_sign_is_detected(monkeypatch):
  right = policy_gradient.surrogate
  monkeypatch.setattr(module, 'surrogate', lambda *a, **k: -right(*a, **k))
  found = settled(recipe_of(divide_by_std=False), lr=0.1, steps=50)
  assert np.abs(found - without_division(2)).max() > 0.1


def test_a_wrong_baseline_is_detected(monkeypatch):
  def others(returns, weight, *, divide):
    del divide
    return returns - policy_gradient.leave_one_out(returns, weight)

  monkeypatch.setattr(module, 'group_advantage', others)
  found = settled(recipe_of(divide_by_std=False))
  assert np.abs(found - without_division(2)).max() > 1e-2


@pytest.mark.parametrize('name', ['k1', 'k2'])
def test_another_estimator_is_detected(monkeypatch, name):
  monkeypatch.setattr(module, 'k3', getattr(policy_gradient, name))
  found = settled(recipe_of(divide_by_std=False))
  assert not np.abs(found - without_division(2)).max() < 1e-2


def test_without_kl_there_is_no_reference():
  recipe = recipe_of(exact=False, kl_coef=0.0)
  assert set(recipe.init) == {'policy'} and not recipe.follow
  seen = []
  bandit.run(
    recipe,
    bandit.natural_gradient(0.1),
    rows=64,
    steps=2,
    watch=lambda state, metrics: seen.append(metrics),
  )
  assert not {'kl', 'loss/kl'} & set(seen[0])
  assert seen[0]['logprob_gap'].number < 1e-5


def test_the_first_of_two_updates_has_ratio_1():
  recipe = recipe_of(exact=False, updates=2, response_count=4)
  tx = bandit.natural_gradient(0.1)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, bandit.prompts(256), 0)
  loss, metrics = recipe.objective(
    {**state.params, **state.frozen}, batch, jax.random.key(0)
  )
  np.testing.assert_allclose(loss['policy_gradient'][1].value, 0, atol=1e-6)
  assert metrics['logp_drift'].number < 1e-6
  # The second update sees a policy that has moved.
  _, metrics = jax.jit(make_step(recipe, tx))(state, batch)
  assert metrics['logp_drift'].number > 1e-3


def test_the_three_means():
  x = jnp.arange(12.0).reshape(1, 2, 6)
  batch = {
    'mask': jnp.asarray([[[1] * 6, [1, 1, 0, 0, 0, 0]]], bool),
    'weight': jnp.ones((1, 2)),
  }
  want = {
    'response': (15 / 6 + 13 / 2) / 2,
    'token': 28 / 8,
    'constant': (15 / 6 + 13 / 6) / 2,
  }
  for name, number in want.items():
    mean = module.MEANS[name](x, batch)
    assert isinstance(mean, Mean)
    np.testing.assert_allclose(mean.value, number, rtol=1e-6)


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
  np.testing.assert_allclose(found, bandit.REF, atol=1e-7)


def test_flat_groups_counts_prompts():
  # Two of five arms tie: two draws are flat if equal or both of the pair.
  rewards = np.array([0.0, 1.0, 2.0, 3.0, 3.0])
  p = bandit.REF
  share = (p[:3] ** 2).sum() + p[3:].sum() ** 2
  seen = []
  bandit.run(
    recipe_of(rewards=rewards),
    bandit.natural_gradient(0.1),
    rows=1,
    steps=1,
    watch=lambda state, metrics: seen.append(metrics['flat_groups'].number),
  )
  np.testing.assert_allclose(seen[0], share, atol=1e-6)


@pytest.mark.parametrize(
  'numbers, words',
  [
    ({'response_count': 1}, 'recipe.response_count: found 1, expected 2'),
    ({'mean_over': 'batch'}, "recipe.mean_over: found 'batch', expected one"),
    ({'ratio_of': 'word'}, "recipe.ratio_of: found 'word', expected one of"),
    ({'clip_low': 2.0}, 'recipe.clip_low: found 2, expected a number from'),
    ({'clip_high': -1.0}, 'recipe.clip_high: found -1, expected 1e-06 or more'),
    ({'kl_coef': -1.0}, 'recipe.kl_coef: found -1, expected 0 or more'),
  ],
)
def test_bad_numbers_are_one_sentence(numbers, words):
  with pytest.raises(UserError, match=words.replace('.', r'\.')):
    recipe_of(exact=False, **numbers)
