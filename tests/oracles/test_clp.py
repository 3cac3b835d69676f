"""CLP on a bandit: the optimum at every weighting, and what soups cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Model, Policy
from alignjax.models.tabular import tabular
from alignjax.policies import conditioned
from alignjax.policies.combine import sampled
from alignjax.recipes import clp as recipes
from alignjax.recipes.clp import clp
from alignjax.stages import groups as grouping
from alignjax.stages.rollout import enumerate_arms
from alignjax.step import init_state, make_step

REF = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([[1.0, 0, -1, 0], [-1, 0, 1, 2]])
# Numbers that no specification gives: three objectives, five arms.
OTHER_REF = np.array([0.1, 0.3, 0.15, 0.25, 0.2])
OTHER = np.array([[0.5, 0, -1, 0.2, 1], [0, 1, 0.3, -0.6, 0], [-1, 0, 0, 1, 1]])
SIMPLEX = [(a / 5, 1 - a / 5) for a in range(6)]


def optimum(w, alpha, ref=REF, rewards=REWARDS):
  """pi_ref exp((1 - alpha) / alpha w.R) / Z."""
  p = ref * np.exp((1 - alpha) / alpha * (np.asarray(w) @ rewards))
  return p / p.sum()


def value(p, w, alpha, ref=REF, rewards=REWARDS):
  """(1 - alpha) w.E[R] - alpha KL."""
  gain = (1 - alpha) * (np.asarray(w) @ rewards @ p)
  return gain - alpha * np.sum(p * np.log(p / ref))


def scores(rewards=REWARDS):
  """The objectives, behind a score that is none of them."""
  table = jnp.asarray(np.vstack([0 * rewards[:1] + 7, rewards]), jnp.float32)

  def reward(bundle, batch, key):
    del bundle, key
    return jnp.moveaxis(table[:, batch['response'][..., 0]], 0, -1)

  reward.names = ('other', *(f'r{i}' for i in range(len(rewards))))
  return reward


def recipe_of(model, rewards=REWARDS, *, exact=True, groups=8, **numbers):
  numbers = (
    dict(objectives=scores(rewards).names[1:], max_new_tokens=1)
    | dict(kl_coef_low=0.5, kl_coef_high=0.5, groups=groups)
    | dict(baseline='none' if exact else 'leave_one_out')
    | numbers
  )
  recipe = clp(model, scores(rewards), **numbers)
  if not exact:
    return recipe
  vary = numbers['kl_coef_high'] > numbers['kl_coef_low']
  policy = conditioned.conditioned(model.policy, 'policy', reference=vary)
  drawn = {k: numbers[k] for k in ('top_k', 'top_p') if k in numbers}
  policy = sampled(policy, temperature=1.0, **drawn)
  arms = enumerate_arms([(policy, 1)], arms=rewards.shape[1])
  stages = (recipe.stages[0], grouping.grouped(arms, groups))
  return recipe._replace(stages=(*stages, *recipe.stages[2:]))


def fit(recipe, tx, *, rows, steps, seed=0, microbatches=1, start=None):
  """The loop without its files; the bundle at its end."""
  start = {'reference': '@policy'} if start is None else start
  state = init_state(recipe, tx, seed, start=start)
  step = make_step(recipe, tx, seed=seed, microbatches=microbatches)

  @jax.jit
  def whole(state):
    def one(state, _):
      ids = state.step * rows + jnp.arange(rows, dtype=jnp.int32)
      batch = {'id': ids, 'prompt': jnp.zeros((rows, 1), jnp.int32)}
      return step(state, train.stage_batch(recipe, state, batch, seed))

    return jax.lax.scan(one, state, length=steps)

  state, metrics = whole(state)
  return {**state.params, **state.frozen}, metrics


def at(model, bundle, condition):
  """The policy's probabilities at a condition, by its own view and start."""
  vary = len(condition) > len(bundle['policy']['copies'])
  policy = conditioned.conditioned(model.policy, 'policy', reference=vary)
  batch = {
    'prompt': jnp.zeros((1, 1), jnp.int32),
    'condition': jnp.asarray([condition], jnp.float32),
  }
  logits, _ = policy.start(policy.view(bundle, batch), batch, 1)
  return np.asarray(jax.nn.softmax(logits[0]), np.float64)


def expert_table(alpha, ref=REF, rewards=REWARDS):
  """Copies that are each optimal for one reward."""
  return {
    'copies': {
      str(i): {'logits': jnp.log(optimum(w, alpha, ref, rewards))[None]}
      for i, w in enumerate(np.eye(len(rewards)))
    }
  }


def table(ref=REF):
  return tabular(np.log(ref)[None])


def sgd(first, decay=0.0):
  return optax.sgd(lambda k: first / (1 + decay * k))


def test_golden_numbers_of_mixed_logits():
  golden = [0.183724, 0.227182, 0.249707, 0.339387]
  w = (0.25, 0.75)
  np.testing.assert_allclose(optimum(w, 0.5), golden, atol=6e-7)
  bundle = {'policy': expert_table(0.5)}
  np.testing.assert_allclose(at(table(), bundle, w), golden, atol=1e-6)
  experts = np.stack([optimum(e, 0.5) for e in np.eye(2)])
  wrong = [0.237954, 0.178129, 0.247512, 0.336404]
  np.testing.assert_allclose(w @ experts, wrong, atol=6e-7)


def test_golden_numbers_across_kl():
  # From ends of alpha 0.5 outwards to 0.2: k = 4, beyond the simplex.
  golden = [0.001284, 0.007113, 0.035040, 0.956563]
  w = np.array([0.25, 0.75])
  np.testing.assert_allclose(optimum(w, 0.2), golden, atol=6e-7)
  bundle = {
    'policy': expert_table(0.5),
    'reference': {'logits': jnp.log(REF)[None]},
  }
  condition = recipes.mixing(jnp.asarray(w), 0.2, 0.5, True)
  np.testing.assert_allclose(condition, [1, 3, -3], atol=1e-6)
  np.testing.assert_allclose(at(table(), bundle, condition), golden, atol=2e-6)


@pytest.mark.parametrize('alpha', [0.3, 0.5, 0.9])
def test_mixed_logits_are_optimal_zero_shot(alpha):
  bundle = {
    'policy': expert_table(0.3, OTHER_REF, OTHER),
    'reference': {'logits': jnp.log(OTHER_REF)[None]},
  }
  for w in np.random.default_rng(0).dirichlet(np.ones(3), 5):
    found = at(
      table(OTHER_REF),
      bundle,
      recipes.mixing(jnp.asarray(w), alpha, 0.3, True),
    )
    expected = optimum(w, alpha, OTHER_REF, OTHER)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
  'ref, rewards', [(REF, REWARDS), (OTHER_REF, OTHER)], ids=['golden', 'other']
)
def test_trained_mixture_is_optimal_at_every_weighting(ref, rewards):
  model = table(ref)
  bundle, _ = fit(
    recipe_of(model, rewards), sgd(3.0), rows=8, steps=4000, microbatches=1
  )
  count = len(rewards)
  weightings = [
    *np.eye(count),
    *np.random.default_rng(1).dirichlet([1] * count, 4),
  ]
  for w in weightings:
    expected = optimum(w, 0.5, ref, rewards)
    np.testing.assert_allclose(at(model, bundle, w), expected, atol=1e-5)


def test_kl_as_a_condition():
  model = table()
  recipe = recipe_of(model, kl_coef_low=0.4, kl_coef_high=0.9)
  bundle, metrics = fit(recipe, sgd(3.0), rows=8, steps=4000)
  assert recipe.mixed['policy'].names == ('r0', 'r1', 'reference')
  drawn = metrics['kl_coef'].total / metrics['kl_coef'].weight
  assert drawn.min() >= 0.4 and drawn.max() <= 0.9
  for alpha in (0.4, 0.55, 0.9):
    for w in SIMPLEX:
      condition = recipes.mixing(jnp.asarray(w), alpha, 0.4, True)
      found = at(model, bundle, condition)
      np.testing.assert_allclose(found, optimum(w, alpha), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sampled_form(seed):
  model = table()
  recipe = recipe_of(model, exact=False)
  bundle, _ = fit(recipe, sgd(4.0, 0.02), rows=2048, steps=400, seed=seed)
  for w in SIMPLEX:
    np.testing.assert_allclose(at(model, bundle, w), optimum(w, 0.5), atol=1e-2)


def test_microbatches_and_single_responses_change_nothing():
  # 16 rows in 4 groups, over 1 or 4 microbatches; and a lone response's
  # baseline is its own group's.
  model = table()
  recipe = recipe_of(model, exact=False, groups=4, response_count=1)
  tables = [
    fit(recipe, sgd(1.0), rows=16, steps=3, microbatches=parts)[0]['policy']
    for parts in (1, 4)
  ]
  for other in tables[1:]:
    for a, b in zip(jax.tree.leaves(tables[0]), jax.tree.leaves(other)):
      np.testing.assert_allclose(a, b, atol=1e-6)


# The last arm is never among the four likeliest, nor in 0.998 of the mass.
RARE = np.append(REF, 1e-4) / (1 + 1e-4)
RARE_REWARDS = np.append(REWARDS, [[3.0], [3.0]], axis=1)


@pytest.mark.parametrize(
  'numbers, high',
  [({'top_k': 4}, 0.5), ({'top_p': 0.998}, 0.9)],
  ids=['alpha fixed', 'alpha drawn'],
)
def test_truncated_sampling_is_optimal_on_what_it_keeps(numbers, high):
  model = table(RARE)
  recipe = recipe_of(model, RARE_REWARDS, kl_coef_high=high, **numbers)
  bundle, _ = fit(recipe, sgd(3.0), rows=8, steps=4000)
  for w in SIMPLEX:
    condition = recipes.mixing(jnp.asarray(w), 0.5, 0.5, high > 0.5)
    found = at(model, bundle, condition)[:4]
    expected = optimum(w, 0.5)
    np.testing.assert_allclose(found / found.sum(), expected, atol=2e-5)
  # What cannot be drawn is not learned about, whatever its reward.
  for copy in bundle['policy']['copies'].values():
    assert float(copy['logits'][0, 4]) == np.float32(np.log(RARE[4]))


@pytest.mark.parametrize('make', [clp, recipes.told])
def test_scoring_another_distribution_than_the_sampled_is_seen(make):
  numbers = dict(objectives=('r0', 'r1'), max_new_tokens=1)
  drawn = make(table(), scores(), top_k=2, **numbers)
  whole = make(table(), scores(), **numbers)
  begin = 2 if make is clp else 1  # up to and with the rollout
  wrong = drawn.stages[:begin] + whole.stages[begin:]
  for stages, recipe, right in (
    (drawn.stages, drawn, True),
    (wrong, whole, False),
  ):
    gap = gap_of(recipe._replace(stages=stages))
    assert (gap < 1e-5) == right and (gap > 0.1) != right


def gap_of(recipe):
  state = init_state(recipe, sgd(1.0), 0, start={'reference': '@policy'})
  prompt = jnp.zeros((8, 1), jnp.int32)
  batch = {'id': jnp.arange(8, dtype=jnp.int32), 'prompt': prompt}
  batch |= {'plain_prompt': prompt, 'condition': jnp.full((8, 2), 0.5)}
  batch = train.stage_batch(recipe, state, batch, 0)
  step = jax.jit(make_step(recipe, sgd(1.0)))
  return step(state, batch)[1]['logprob_gap'].number


def product() -> Model:
  """logits = log ref + b a: equal policies, unequal parameters."""

  def policy(role) -> Policy:
    def view(bundle, batch):
      p = bundle[role]
      return (jnp.log(jnp.asarray(REF, jnp.float32)) + p['b'] * p['a'])[None]

    return table().policy(role)._replace(view=view)

  return table()._replace(
    init=lambda key: {'a': jnp.zeros(4), 'b': jnp.ones(1)}, policy=policy
  )


def mean_value(policy_of, alpha=0.5):
  """V averaged over the weightings, and the best there is."""
  found = np.mean([value(policy_of(w), w, alpha) for w in SIMPLEX])
  return found, np.mean([value(optimum(w, alpha), w, alpha) for w in SIMPLEX])


def test_soups_fail_where_training_the_mixture_does_not():
  model = product()
  experts = {
    str(i): {
      'a': jnp.asarray(sign * REWARDS[i], jnp.float32),
      'b': jnp.array([float(sign)]),
    }
    for i, sign in enumerate((1, -1))
  }
  soup = {'policy': {'copies': experts}}
  for w in np.eye(2):
    np.testing.assert_allclose(at(model, soup, w), optimum(w, 0.5), atol=1e-6)
  np.testing.assert_allclose(at(model, soup, (0.5, 0.5)), REF, atol=1e-6)
  found, best = mean_value(lambda w: at(model, soup, w))
  assert best - found > 0.01
  bundle, _ = fit(recipe_of(model), sgd(0.5), rows=8, steps=3000)
  found, best = mean_value(lambda w: at(model, bundle, w))
  assert -1e-6 < best - found < 1e-3


def unscaled(params, condition, reference=None):
  """Mixed weights whose gradient does not know the weights."""
  hold = jax.lax.stop_gradient
  ends = params['copies'].values()
  return jax.tree.map(
    lambda *xs: sum(w * hold(x) + x - hold(x) for w, x in zip(condition, xs)),
    *ends,
  )


def test_mistakes_are_detected(monkeypatch):
  model, good = table(), conditioned.mix
  over = grouping.over

  def worst():
    bundle, _ = fit(recipe_of(model), sgd(2.0), rows=8, steps=200)
    monkeypatch.undo()
    return max(
      np.abs(at(model, bundle, w) - optimum(w, 0.5)).max() for w in SIMPLEX
    )

  assert worst() < 0.02
  ignored = jnp.array([0.5, 0.5])
  monkeypatch.setattr(
    conditioned, 'mix', lambda params, w, fixed=None: good(params, ignored)
  )
  assert worst() > 0.1  # conditions ignored
  monkeypatch.setattr(
    jax.random, 'dirichlet', lambda key, a: jnp.full(len(a), 1 / len(a))
  )
  assert worst() > 0.1  # one fixed weighting
  monkeypatch.setattr(conditioned, 'mix', unscaled)
  assert worst() > 0.1  # a copy's gradient without its weight
  monkeypatch.setattr(
    grouping, 'over', lambda fn, batch, groups: over(fn, batch, 1)
  )
  assert worst() > 0.05  # weights drawn per row, mixed per batch


def test_conditions_depend_on_the_step_and_the_group_only():
  recipe = recipe_of(table(), groups=4)
  key = jax.random.key(3)

  def drawn(rows, key):
    ids = {'id': jnp.arange(rows) + rows}
    return np.asarray(recipe.stages[0]({}, ids, key)['condition'])

  few, many = drawn(4, key), drawn(12, key)
  np.testing.assert_array_equal(np.repeat(few, 3, axis=0), many)
  assert len({tuple(row) for row in few}) == 4
  assert not np.array_equal(few, drawn(4, jax.random.key(4)))
  np.testing.assert_allclose(few.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
  'numbers, message',
  [
    (dict(objectives=()), 'recipe.objectives: found '),
    (dict(objectives=('r0', 'nice')), "names of the scores .*'other', 'r0'"),
    (dict(objectives=('r0', 'r0')), 'expected different names'),
    (dict(objectives=('r0',)), 'nothing to condition on'),
    (dict(kl_coef_low=0.6), 'recipe.kl_coef_high: found 0.5'),
    (dict(kl_coef_low=0.0), 'recipe.kl_coef_low: found 0'),
    (dict(concentration=0.0), 'recipe.concentration'),
    (dict(groups=0), 'recipe.groups: found 0'),
    (dict(temperature=0.0), 'temperature = 0, top_k = 0 and top_p = 1'),
    (dict(top_k=-1), 'top_k = -1 and top_p = 1: expected'),
  ],
)
def test_bad_numbers(numbers, message):
  with pytest.raises(UserError, match=message):
    recipe_of(table(), exact=False, **numbers)


def test_groups_must_divide_the_rows():
  recipe = recipe_of(table(), exact=False, groups=3)
  with pytest.raises(UserError, match='groups = 3 does not divide the 4 rows'):
    fit(recipe, sgd(1.0), rows=4, steps=1)
  recipe = recipe_of(table(), exact=False, groups=4)
  with pytest.raises(UserError, match='does not divide the 2 rows'):
    fit(recipe, sgd(1.0), rows=4, steps=1, microbatches=2)
