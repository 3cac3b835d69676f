"""BOND on a bandit: every golden number of its closed form.

Best-of-n is the optimum for any Jeffreys weight when the reward is exact; the
exact-expectation form enumerates all draws, the sampled one draws them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.types import Mean
from alignjax.losses.calibration import best_of_n_kl, quantile
from alignjax.models.tabular import tabular
from alignjax.recipes import bond as module
from alignjax.recipes.bond import bond
from alignjax.stages.rollout import enumerate_arms
from alignjax.system.optimizer import optimizer
from tests.oracles import bandit

TABLE = {
  2: ([0.0100, 0.0800, 0.2700, 0.3625, 0.2775], 0.180629, 0.193147),
  4: ([0.0001, 0.0080, 0.1215, 0.392406, 0.477994], 0.594626, 0.636294),
  8: ([0.0, 0.000066, 0.016731, 0.255694, 0.727509], 1.105670, 1.204442),
}


def exact(n, weight, *, ref=bandit.REF, rewards=bandit.REWARD, **changes):
  model = bandit.model(ref)
  numbers = dict(discrete_correction=True, quantile_floor=1e-9) | changes
  recipe = bond(
    model,
    bandit.reward(rewards),
    n=n,
    jeffreys_weight=weight,
    max_new_tokens=1,
    baseline='none',
    **numbers,
  )
  draws = [(model.policy('policy'), 1), (model.policy('anchor'), n)]
  arms = enumerate_arms(draws, arms=len(ref), support=True)
  return recipe._replace(stages=(arms, *recipe.stages[1:]))


@pytest.mark.parametrize('n', [2, 4, 8])
def test_golden_best_of_n(n):
  target, kl, bound = TABLE[n]
  closed = bandit.best_of(bandit.REF, n)
  np.testing.assert_allclose(closed, target, atol=6e-7)
  measured = np.sum(closed * np.log(closed / bandit.REF))
  np.testing.assert_allclose(measured, kl, atol=6e-7)
  np.testing.assert_allclose(best_of_n_kl(n), bound, atol=6e-7)


def test_best_of_2_twice_is_best_of_4():
  twice = bandit.best_of(bandit.best_of(bandit.REF, 2), 2)
  np.testing.assert_allclose(twice, bandit.best_of(bandit.REF, 4), atol=1e-12)


@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('n', [2, 4, 8])
def test_exact_optimum_is_best_of_n_for_any_jeffreys_weight(n, weight):
  found, _ = bandit.run(
    exact(n, weight), bandit.natural_gradient(0.5), rows=1, steps=100
  )
  np.testing.assert_allclose(found, bandit.best_of(bandit.REF, n), atol=1e-5)


def test_the_configured_optimizer_gets_there_too():
  tx = optimizer(3000, lr=0.1, schedule='linear', clip_norm=1.0)
  found, _ = bandit.run(exact(2, 0.5), tx, rows=1, steps=3000)
  np.testing.assert_allclose(found, bandit.best_of(bandit.REF, 2), atol=1e-5)


@pytest.mark.parametrize('n, distance', [(2, 0.048), (4, 0.077)])
def test_without_the_second_term_the_target_is_another(n, distance):
  upto = np.cumsum(bandit.REF)
  target = bandit.REF * upto ** (n - 1)
  target /= target.sum()
  if n == 2:
    golden = [0.016327, 0.097959, 0.293878, 0.346939, 0.244898]
    np.testing.assert_allclose(target, golden, atol=6e-7)
  recipe = exact(n, 1.0, discrete_correction=False)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.5), rows=1, steps=100)
  np.testing.assert_allclose(found, target, atol=1e-5)
  gap = 0.5 * np.abs(found - bandit.best_of(bandit.REF, n)).sum()
  np.testing.assert_allclose(gap, distance, atol=5e-4)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
def test_sampled_form(weight, seed):
  # 67 draws a row: under 2e6 completions in all.
  rows, steps = 480, 60
  recipe = bond(
    bandit.model(),
    bandit.reward(),
    n=2,
    jeffreys_weight=weight,
    quantile_count=64,
    quantile_floor=1 / 65,
    discrete_correction=True,
    max_new_tokens=1,
  )

  def rate(step):
    return 0.5 / (1 + 0.4 * step)

  found, _ = bandit.run(
    recipe, bandit.natural_gradient(rate), rows=rows, steps=steps, seed=seed
  )
  np.testing.assert_allclose(found, bandit.best_of(bandit.REF, 2), atol=1e-2)


def test_iterative_bond_compounds():
  # A hard anchor update after convergence: best-of-2, then best-of-4.
  recipe = exact(2, 0.5, anchor_period=100)
  seen = []
  bandit.run(
    recipe,
    bandit.natural_gradient(0.5),
    rows=1,
    steps=200,
    watch=lambda state, _: seen.append(state.params['policy']),
  )
  for steps, n in ((100, 2), (200, 4)):
    found = bandit.probabilities(seen[steps - 1])
    np.testing.assert_allclose(found, bandit.best_of(bandit.REF, n), atol=1e-5)


@pytest.mark.parametrize('n, period', [(2, 60), (4, 60)])
def test_iterated_n_is_best_of_its_powers(n, period):
  ref, rewards = np.array([0.3, 0.5, 0.2]), np.array([1.0, 0.0, 4.0])
  recipe = exact(n, 0.5, ref=ref, rewards=rewards, anchor_period=period)
  seen = []
  bandit.run(
    recipe,
    bandit.natural_gradient(0.5),
    rows=1,
    steps=2 * period,
    watch=lambda state, _: seen.append(state.params['policy']),
  )
  for rounds in (1, 2):
    found = bandit.probabilities(seen[rounds * period - 1])
    target = bandit.best_of(ref, n**rounds, rewards)
    np.testing.assert_allclose(found, target, atol=1e-5)


def test_a_moving_average_compounds_too():
  rewards = []
  bandit.run(
    exact(2, 0.5, ema_rate=0.05),
    bandit.natural_gradient(0.2),
    rows=1,
    steps=150,
    watch=lambda state, _: rewards.append(
      bandit.probabilities(state.params['policy']) @ bandit.REWARD
    ),
  )
  assert np.all(np.diff(rewards) > -1e-6)
  assert rewards[-1] > bandit.best_of(bandit.REF, 8) @ bandit.REWARD


@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('n', [2, 4])
def test_other_numbers(n, weight):
  numbers = dict(ref=bandit.OTHER_REF, rewards=bandit.OTHER_REWARD)
  recipe = exact(n, weight, **numbers)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.5), rows=1, steps=100)
  target = bandit.best_of(bandit.OTHER_REF, n, bandit.OTHER_REWARD)
  np.testing.assert_allclose(found, target, atol=1e-5)


def test_best_of_n_of_tied_rewards():
  # A draw among ties is uniform; the backward form needs no draws at all.
  tied = np.array([1.0, 0.0, 1.0, 2.0])
  recipe = exact(4, 1.0, ref=bandit.OTHER_REF, rewards=tied)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.5), rows=1, steps=100)
  target = bandit.best_of(bandit.OTHER_REF, 4, tied)
  np.testing.assert_allclose(found, target, atol=1e-5)
  np.testing.assert_allclose(target.sum(), 1)


@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('weight', [0.25, 0.5, 1.0])
def test_mixed_optimum_without_the_second_term(n, weight):
  recipe = exact(n, weight, discrete_correction=False)
  found, _ = bandit.run(recipe, bandit.natural_gradient(0.3), rows=1, steps=200)
  np.testing.assert_allclose(found, without_b(n, weight), atol=1e-5)
  # The weight on the other term is another policy.
  if weight == 0.25:
    assert np.abs(found - without_b(n, 0.75)).max() > 4e-3


def without_b(n, weight, ref=bandit.REF, rewards=bandit.REWARD):
  """The optimum where the reward is log p_<= alone, in float64."""
  _, upto = bandit.quantiles(ref, rewards)
  q = ref * upto ** (n - 1)
  return bandit.mixed(
    weight * np.log(q / q.sum()),
    backward=weight,
    forward=(1 - weight) * bandit.best_of(ref, n, rewards),
  )


def test_a_lost_factor_is_detected():
  # Backward gradients 1 / (n - 1) as strong: another Jeffreys weight.
  right = exact(4, 0.5, discrete_correction=False)

  def lost(bundle, batch, key):
    batch = right.stages[-1](bundle, batch, key)
    return batch | {'advantage': batch['advantage'] / 3}

  broken = right._replace(stages=(*right.stages[:-1], lost))
  tx = bandit.natural_gradient(0.3)
  found, _ = bandit.run(broken, tx, rows=1, steps=200)
  target = without_b(4, 0.5)
  assert np.abs(found - target).max() > 4e-3


def test_a_gradient_through_the_log_ratio_is_detected():
  # E[2 log ratio grad log pi]: as if the reference pulled twice.
  right = exact(2, 1.0)

  def objective(bundle, batch, key):
    loss, metrics = right.objective(bundle, batch, key)
    logp = jax.nn.log_softmax(bundle['policy']['logits'][0])
    logp = logp[batch['response'][:, 0, 0]]
    live = logp - batch['ref_logp'][:, 0, 0]
    frozen = batch['advantage'][:, 0, 0] + jax.lax.stop_gradient(live)
    leaking = Mean.of(-logp * (frozen - live), batch['weight'][:, 0])
    return loss | {'backward': (1.0, leaking)}, metrics

  tx = bandit.natural_gradient(0.3)
  broken = right._replace(objective=objective)
  found, _ = bandit.run(broken, tx, rows=1, steps=100)
  assert np.abs(found - bandit.best_of(bandit.REF, 2)).max() > 0.02


def test_quantiles_are_per_prompt(monkeypatch):
  # Two prompts whose rewards are on different scales, and one that pools them.
  table = np.stack([bandit.REWARD, 100 - bandit.REWARD])
  target = [bandit.best_of(bandit.REF, 2, rewards) for rewards in table]

  def two_prompts():
    model = tabular(np.log([bandit.REF, bandit.REF]))

    def reward(bundle, batch, key):
      rows = jnp.asarray(table, jnp.float32)[batch['prompt'][:, -1]]
      return jnp.take_along_axis(rows[:, None], batch['response'], axis=-1)

    recipe = module.bond(
      model,
      reward,
      n=2,
      jeffreys_weight=1.0,
      discrete_correction=True,
      quantile_floor=1e-9,
      max_new_tokens=1,
      baseline='none',
    )
    draws = [(model.policy('policy'), 1), (model.policy('anchor'), 2)]

    def each(bundle, batch, key):
      return batch | {'prompt': batch['id'][:, None] % 2}

    arms = enumerate_arms(draws, arms=5, support=True)
    recipe = recipe._replace(stages=(each, arms, *recipe.stages[1:]))
    tx = bandit.natural_gradient(0.5)
    _, state = bandit.run(recipe, tx, rows=2, steps=100)
    return np.asarray(jax.nn.softmax(state.params['policy']['logits']))

  np.testing.assert_allclose(two_prompts(), target, atol=1e-5)
  right = module.quantile_of

  def pooled(reward, reference, weight):
    everyone = jnp.broadcast_to(
      reference.ravel(), (len(reward), reference.size)
    )
    share = jnp.broadcast_to(weight.ravel(), everyone.shape)
    return right(reward, everyone, share)

  monkeypatch.setattr(module, 'quantile_of', pooled)
  assert np.abs(two_prompts() - target).max() > 0.02


@pytest.mark.parametrize(
  'numbers, words',
  [
    ({'n': 1}, 'best of 1 is no target'),
    ({'quantile': 'guessed'}, "recipe.quantile: found 'guessed', expected"),
    ({'quantile_count': 0}, 'recipe.quantile_count: found 0, expected 1 or'),
    ({'jeffreys_weight': -0.5}, 'recipe.jeffreys_weight: found -0.5, expected'),
    ({'anchor_period': 9, 'ema_rate': 0.1}, 'set one of them to 0'),
    (
      {'quantile': 'learned', 'discrete_correction': True},
      "recipe.discrete_correction belongs to recipe.quantile = 'sampled'",
    ),
    (
      {'quantile': 'learned', 'quantile_floor': 0.1},
      "recipe.quantile_floor belongs to recipe.quantile = 'sampled'",
    ),
  ],
)
def test_bad_numbers_are_told(numbers, words):
  with pytest.raises(UserError, match=words):
    bond(bandit.model(), bandit.reward(), **numbers)


def test_quantiles_count_ties_on_one_side_only():
  below, upto = quantile(np.array([1.0]), np.array([0.0, 1.0, 1.0, 2.0]))
  assert (float(below[0]), float(upto[0])) == (0.25, 0.75)
