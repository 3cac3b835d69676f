"""BOND on a bandit: every golden number of its closed form.

Best-of-n is the optimum for any Jeffreys weight when the reward is exact; the
exact-expectation form enumerates all draws, the sampled one draws them.
"""

import numpy as np
import pytest

from alignjax.losses.calibration import best_of_n_kl, quantile
from alignjax.recipes.bond import bond
from alignjax.stages.rollout import enumerate_arms
from alignjax.system.optimizer import optimizer
from tests.oracles import bandit

TABLE = {
  2: ([0.0100, 0.0800, 0.2700, 0.3625, 0.2775], 0.180629, 0.193147),
  4: ([0.0001, 0.0080, 0.1215, 0.392406, 0.477994], 0.594626, 0.636294),
  8: ([0.0, 0.000066, 0.016731, 0.255694, 0.727509], 1.105670, 1.204442),
}


def exact(n, weight, **changes):
  model = bandit.model()
  numbers = dict(discrete_correction=True, quantile_floor=1e-9) | changes
  recipe = bond(
    model,
    bandit.reward(),
    n=n,
    jeffreys_weight=weight,
    max_new_tokens=1,
    baseline='none',
    **numbers,
  )
  draws = [(model.policy('policy'), 1), (model.policy('anchor'), n)]
  arms = enumerate_arms(draws, arms=5, support=True)
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


def test_a_wrong_factor_on_the_backward_gradient_is_seen():
  # With mixed KLs the optimum of inexact rewards depends on the weights, so a
  # lost factor n - 1 shows; this guards the test above against being vacuous.
  right, _ = bandit.run(
    exact(4, 0.5, discrete_correction=False),
    bandit.natural_gradient(0.5),
    rows=1,
    steps=100,
  )
  # Jeffreys weight w with the factor lost = weight w / 3 of the backward term.
  lost, _ = bandit.run(
    exact(4, 0.25, discrete_correction=False),
    bandit.natural_gradient(0.5),
    rows=1,
    steps=100,
  )
  assert np.abs(right - lost).max() > 5e-3


def test_quantiles_count_ties_on_one_side_only():
  below, upto = quantile(np.array([1.0]), np.array([0.0, 1.0, 1.0, 2.0]))
  assert (float(below[0]), float(upto[0])) == (0.25, 0.75)
