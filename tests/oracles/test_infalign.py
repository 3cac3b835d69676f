"""CTRL on a bandit and in quantile space: the tables of its closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.losses import calibration
from alignjax.recipes.infalign import infalign
from alignjax.stages.rollout import enumerate_arms
from tests.oracles import bandit

# Twenty reference responses with exactly the frequencies of F1.
DRAWN = np.repeat(bandit.REWARD, (20 * bandit.REF).round().astype(int))
OTHER = np.array([0.15, 0.25, 0.05, 0.35, 0.2])


def half_ranks(p):
  """C of arms sorted by reward: mass below and half of the own."""
  return np.cumsum(p) - p / 2


def phi(name, scale):
  return lambda u: np.asarray(
    calibration.transform(name, scale, 1e-6)(jnp.asarray(u)), np.float64
  )


def target(ref, name, scale, kl_coef):
  p = ref * np.exp(phi(name, scale)(half_ranks(ref)) / kl_coef)
  return p / p.sum()


def win_rate(p, q):
  """P(a draw of p beats one of q), arms sorted by reward, ties half."""
  return float(p @ half_ranks(q))


def procedures(p, q):
  """W, best-of-4 and worst-of-4 win rates of p over q."""

  ranks = np.arange(len(p))

  def best(p):
    return bandit.best_of(p, 4, ranks)

  def worst(p):
    return bandit.best_of(p, 4, -ranks)

  return (
    win_rate(p, q),
    win_rate(best(p), best(q)),
    win_rate(worst(p), worst(q)),
  )


def recipe_of(ref=bandit.REF, *, exact=True, **numbers):
  model = bandit.model(ref)
  numbers = dict(baseline='none' if exact else 'leave_one_out') | numbers
  recipe = infalign(model, bandit.reward(), max_new_tokens=1, **numbers)
  if exact:
    arms = enumerate_arms([(model.policy('policy'), 1)], arms=5)
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def found(recipe, drawn=DRAWN, kl_coef=1.0, **how):
  how = dict(rows=1, steps=1) | how
  tx = how.pop('tx', None) or bandit.natural_gradient(1 / kl_coef)
  fields = {'ref_reward': jnp.asarray(drawn, jnp.float32)}
  return bandit.run(recipe, tx, fields=fields, **how)[0]


# Phi as the paper's table has it is the normalised one times its range.
TABLE = [
  ('identity', 0.0, 0.2, [0.004553, 0.019279, 0.100933, 0.332666, 0.542568]),
  ('exp', 5.0, 40.0, [0.031699, 0.065712, 0.116743, 0.196091, 0.589755]),
  ('exp', -5.0, 0.1, [0.000095, 0.011553, 0.239185, 0.438087, 0.311079]),
]
NUMBERS = [
  (0.62349, 0.79256, 0.74189, 0.90269),
  (0.54005, 0.75495, 0.74813, 0.76243),
  (0.38486, 0.71531, 0.66195, 0.89043),
]


def normalised(name, scale, kl_coef):
  if name != 'exp':
    return kl_coef
  return kl_coef / abs(np.expm1(scale))


@pytest.mark.parametrize(
  'row, numbers', list(zip(TABLE, NUMBERS)), ids=['u', 'exp(5u)', '-exp(-5u)']
)
def test_the_discrete_table(row, numbers):
  name, scale, kl_coef, golden = row
  kl_coef = normalised(name, scale, kl_coef)
  recipe = recipe_of(transform=name, transform_scale=scale, kl_coef=kl_coef)
  p = found(recipe, kl_coef=kl_coef)
  np.testing.assert_allclose(
    p, target(bandit.REF, name, scale, kl_coef), atol=1e-5
  )
  np.testing.assert_allclose(p, golden, atol=2e-6)
  kl = float(np.sum(p * np.log(p / bandit.REF)))
  np.testing.assert_allclose(
    (kl, *procedures(p, bandit.REF)), numbers, atol=2e-5
  )


@pytest.mark.parametrize('name, scale', [('log', 0.0), ('exp', 3.0)])
def test_another_reference(name, scale):
  drawn = np.repeat(bandit.REWARD, (20 * OTHER).round().astype(int))
  recipe = recipe_of(OTHER, transform=name, transform_scale=scale, kl_coef=0.4)
  p = found(recipe, drawn, kl_coef=0.4)
  np.testing.assert_allclose(p, target(OTHER, name, scale, 0.4), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sampled_form(seed):
  p = found(
    recipe_of(exact=False, transform_scale=5.0, kl_coef=0.5),
    tx=bandit.natural_gradient(lambda step: 1.0 / (1 + 0.2 * step)),
    rows=4096,
    steps=200,
    seed=seed,
  )
  np.testing.assert_allclose(p, target(bandit.REF, 'exp', 5.0, 0.5), atol=1e-2)


def test_a_monotone_reward_changes_nothing():
  recipe = recipe_of(kl_coef=0.5)
  model = bandit.model()
  stretched = infalign(
    model,
    bandit.reward(np.exp(bandit.REWARD)),
    kl_coef=0.5,
    max_new_tokens=1,
    baseline='none',
  )
  arms = enumerate_arms([(model.policy('policy'), 1)], arms=5)
  stretched = stretched._replace(stages=(arms, *stretched.stages[1:]))
  np.testing.assert_allclose(
    found(recipe, kl_coef=0.5),
    found(stretched, np.exp(DRAWN), kl_coef=0.5),
    atol=1e-6,
  )


def test_a_wrong_direction_is_detected():
  # exp(t u) with t < 0 that is not turned round trains towards bad answers.
  wrong = infalign(
    bandit.model(),
    bandit.reward(),
    transform='tests.oracles.test_infalign.unturned',
    kl_coef=0.1,
    max_new_tokens=1,
    baseline='none',
  )
  arms = enumerate_arms([(bandit.model().policy('policy'), 1)], arms=5)
  p = found(wrong._replace(stages=(arms, *wrong.stages[1:])), kl_coef=0.1)
  assert win_rate(p, bandit.REF) < 0.4
  assert np.abs(p - target(bandit.REF, 'exp', -5.0, 0.1)).max() > 0.1


def unturned(u):
  return jnp.exp(-5 * u)


def fixed_point(ref, n, kl_coef):
  """(arms' exact best-of-n reward at the optimum, the optimum)."""
  upto = np.cumsum(ref)
  below = upto - ref
  middle = (upto**n + below**n) / 2
  p = ref
  for _ in range(2000):
    gains = n * np.cumsum(p)[:-1] ** (n - 1) * np.diff(middle)
    reward = -np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    tilted = ref * np.exp(reward / kl_coef)
    p = 0.7 * p + 0.3 * tilted / tilted.sum()
  return reward, p


def best_of_4(u):
  reward, _ = fixed_point(bandit.REF, 4, 0.1)
  return jnp.interp(u, half_ranks(bandit.REF), reward)


def test_the_exact_transform_of_arms_as_a_users_function():
  _, optimum = fixed_point(bandit.REF, 4, 0.1)
  golden = [0.049397, 0.098796, 0.149449, 0.163310, 0.539047]
  np.testing.assert_allclose(optimum, golden, atol=2e-6)
  name = 'tests.oracles.test_infalign.best_of_4'
  p = found(recipe_of(transform=name, kl_coef=0.1), kl_coef=0.1)
  np.testing.assert_allclose(p, optimum, atol=1e-5)
  np.testing.assert_allclose(procedures(p, bandit.REF)[1], 0.739307, atol=2e-6)


def test_a_tie_counts_half():
  zero_one = jnp.array([0.0, 1.0])
  chance = calibration.calibrated(zero_one, jnp.array([0.0, 0.0, 0.0, 1.0]))
  np.testing.assert_allclose(chance, [3 / 8, 7 / 8])
  np.testing.assert_allclose(jnp.array([3, 1]) @ chance / 4, 0.5)


# Quantile space: the reward's quantile u is uniform under the reference.
GRID = (np.arange(40_000) + 0.5) / 40_000
ATOMLESS = [
  # KL, Phi, kl_coef of the unnormalised Phi, W, BoN2, BoN4, WoN2, WoN4
  (0.5, ('identity', 0), 0.2428, 0.7737, 0.7917, 0.7998, 0.8403, 0.8860),
  (0.5, ('log', 0), 0.4321, 0.7682, 0.7682, 0.7682, 0.8559, 0.9270),
  (0.5, ('exp', 5), 47.95, 0.7461, 0.8154, 0.8566, 0.7529, 0.7465),
  (0.5, ('exp', 10), 7012, 0.7117, 0.8031, 0.8715, 0.6936, 0.6763),
  (0.5, ('exp', -5), 0.0703, 0.7539, 0.7348, 0.7230, 0.8587, 0.9439),
  (0.5, ('exp', -10), 0.01151, 0.7358, 0.7041, 0.6859, 0.8509, 0.9476),
  (1.0, ('identity', 0), 0.1361, 0.8646, 0.8733, 0.8770, 0.9368, 0.9745),
  (1.0, ('log', 0), 0.1885, 0.8631, 0.8631, 0.8631, 0.9441, 0.9859),
  (1.0, ('exp', 5), 34.20, 0.8390, 0.8964, 0.9192, 0.8585, 0.8572),
  (1.0, ('exp', 10), 5315, 0.8010, 0.8905, 0.9351, 0.7891, 0.7712),
  (1.0, ('exp', -10), 9.585e-4, 0.8479, 0.8247, 0.8095, 0.9475, 0.9927),
]
OPTIMAL = [
  # KL, n, worst?, kl_coef, W, BoN2, BoN4, WoN2, WoN4
  (0.5, 4, False, 0.2165, 0.7025, 0.7963, 0.8733, 0.6818, 0.6646),
  (0.5, 4, True, 0.2085, 0.7344, 0.7003, 0.6803, 0.8511, 0.9479),
  (1.0, 2, False, 0.1127, 0.8345, 0.8969, 0.9252, 0.8509, 0.8487),
  (1.0, 4, False, 0.08298, 0.7737, 0.8759, 0.9411, 0.7522, 0.7327),
  (1.0, 4, True, 0.02822, 0.8389, 0.8075, 0.7863, 0.9452, 0.9929),
]


def density(values, kl_coef):
  """exp(Phi / kl_coef) / Z on the grid."""
  f = np.exp((values - values.max()) / kl_coef)
  return f / f.mean()


def kl_of(f):
  return float(np.mean(f * np.log(np.maximum(f, 1e-300))))


def rates(f):
  """W, BoN2, BoN4, WoN2, WoN4 by quadrature."""
  upto = (np.cumsum(f) - f / 2) / len(f)
  u = GRID
  out = [np.mean(u * f)]
  for n in (2, 4):
    out.append(1 - n * np.mean(u ** (n - 1) * upto**n))
  for n in (2, 4):
    out.append(n * np.mean((1 - u) ** (n - 1) * (1 - upto) ** n))
  return out


def at_kl(values, kl):
  """The strength at which a transform has this KL, by bisection."""
  low, high = 1e-6, 1e3
  for _ in range(80):
    middle = np.sqrt(low * high)
    low, high = (
      (middle, high) if kl_of(density(values, middle)) > kl else (low, middle)
    )
  return middle


@pytest.mark.parametrize('row', ATOMLESS, ids=lambda row: f'{row[1]}, {row[0]}')
def test_the_atomless_table(row):
  kl, (name, scale), kl_coef, *golden = row
  values = phi(name, scale)(GRID)
  strength = at_kl(values, kl)
  np.testing.assert_allclose(
    strength, normalised(name, scale, kl_coef), rtol=2e-3
  )
  np.testing.assert_allclose(
    rates(density(values, strength)), golden, atol=1.1e-4
  )


@pytest.mark.parametrize('row', OPTIMAL, ids=str)
def test_the_optimal_transforms(row):
  kl, n, worst, kl_coef, *golden = row
  f = np.ones_like(GRID)
  for _ in range(400):
    upto = (np.cumsum(f) - f / 2) / len(f)
    gain = (1 - GRID) * (1 - upto) if worst else GRID * upto
    slope = n**2 * gain ** (n - 1)
    values = (np.cumsum(slope) - slope / 2) / len(f)
    f = 0.7 * f + 0.3 * density(values, kl_coef)
  np.testing.assert_allclose(kl_of(f), kl, atol=2e-3)
  np.testing.assert_allclose(rates(f), golden, atol=4e-4)


@pytest.mark.parametrize('name, scale', [('exp', 10.0), ('exp', -10.0)])
def test_many_arms(name, scale):
  # 64 arms with a closed form of their own, and close to no arms at all.
  arms, kl_coef = 64, 0.3
  ref = np.full(arms, 1 / arms)
  rewards = np.arange(arms, dtype=np.float64)
  model = bandit.model(ref)
  recipe = infalign(
    model,
    bandit.reward(rewards),
    transform=name,
    transform_scale=scale,
    kl_coef=kl_coef,
    max_new_tokens=1,
    baseline='none',
  )
  every = enumerate_arms([(model.policy('policy'), 1)], arms=arms)
  p = found(
    recipe._replace(stages=(every, *recipe.stages[1:])),
    rewards,
    kl_coef=kl_coef,
  )
  np.testing.assert_allclose(p, target(ref, name, scale, kl_coef), atol=1e-5)
  smooth = density(phi(name, scale)(GRID), kl_coef)
  np.testing.assert_allclose(
    procedures(p, ref), np.array(rates(smooth))[[0, 2, 4]], atol=8e-3
  )


def test_bad_input():
  with pytest.raises(UserError, match="did you mean 'exp'"):
    recipe_of(transform='expo')
  with pytest.raises(UserError, match='rows without ref_reward'):
    bandit.run(recipe_of(), bandit.natural_gradient(1.0), rows=1, steps=1)
