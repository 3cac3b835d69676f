"""CFG distillation on tables: p_gamma, and where the diversity reward ends.

With unit embeddings and G their Gram matrix, -KL(pi || q) + beta (1 - pi' G pi)
has one maximum, pi_i ~ q_i exp(-2 beta (G pi)_i), where q is the teacher under
guidance (sections 1.8 and T1 to T3 of the algorithm notes).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import lambertw, softmax

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import Follow
from alignjax.losses.policy_gradient import leave_one_out
from alignjax.models.tabular import tabular
from alignjax.policies.combine import sampled
from alignjax.recipes import cfg_distill as module
from alignjax.recipes.cfg_distill import cfg_distill
from alignjax.rewards import diversity as rewards
from alignjax.stages.rollout import enumerate_arms
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests.oracles import bandit
from tests.oracles.rl import annealed

# Rows: the prompt and the negative prompt.
TABLES = [
  np.array([[1.0, 0.3, -0.2, 0.1], [0.2, 0.4, 0.1, -0.3]]),
  np.array([[-0.5, 0.9, 0.4, -1.1], [0.3, 0.8, -0.6, 0.0]]),
]
UNCOND = {'uncond': jnp.array([1])}


def vectors(arms, size=3, seed=0):
  x = np.random.default_rng(seed).normal(size=(arms, size))
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def embedder(rows):
  """A model whose embedding of arm i is row i."""
  return tabular(np.zeros((1, len(rows))))._replace(
    embed_init=lambda key, size=0: {'vectors': jnp.asarray(rows, jnp.float32)}
  )


def recipe_of(table, rows, *, exact=True, **numbers):
  model = tabular(table)
  numbers = dict(guidance_scale=1.0, response_count=2) | numbers
  recipe = cfg_distill(model, embedder(rows), max_new_tokens=1, **numbers)
  if exact:
    cut = {k: numbers[k] for k in ('top_k', 'top_p') if k in numbers}
    policy = sampled(model.policy('policy'), temperature=1.0, **cut)
    draws = [(policy, numbers['response_count'])]
    arms = enumerate_arms(draws, arms=table.shape[1])
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def settled(recipe, beta, *, steps=None, rows=2):
  # A step of 1 over the curvature.
  tx = bandit.natural_gradient(1 / (1 + 2 * beta))
  steps = steps or int(15 * (1 + 2 * beta))
  return bandit.run(recipe, tx, rows=rows, steps=steps, fields=UNCOND)[0]


def teacher_of(table, scale):
  return softmax(scale * table[0] + (1 - scale) * table[1])


def optimum(q, gram, beta):
  """The fixed point, by damped iteration in float64."""
  logits, rate = np.log(q), 1 / (1 + 2 * beta)
  for _ in range(int(60 / rate)):
    logits += rate * (np.log(q) - 2 * beta * gram @ softmax(logits) - logits)
    logits -= logits.max()
  p = softmax(logits)
  flat = np.log(p) - np.log(q) + 2 * beta * gram @ p
  assert np.ptp(flat) < 1e-9
  return p


# Item 1, T1.


@pytest.mark.parametrize('table', TABLES)
@pytest.mark.parametrize('scale', [0.0, 1.0, 3.0])
def test_without_diversity_guidance_ends_in_the_weights(scale, table):
  recipe = recipe_of(table, vectors(4), guidance_scale=scale)
  assert set(recipe.init) == {'policy', 'teacher'} and len(recipe.stages) == 1
  found = settled(recipe, 0.5)
  np.testing.assert_allclose(found, teacher_of(table, scale), atol=1e-5)


# Items 2 to 4, T2.


@pytest.mark.parametrize('response_count', [2, 3, 4])
@pytest.mark.parametrize(
  'table, seed, beta, scale',
  [(TABLES[0], 0, 1.0, 3.0), (TABLES[1], 1, 5.0, 3.0), (TABLES[1], 2, 15, 2)],
)
def test_exact_optimum(table, seed, beta, scale, response_count):
  rows = vectors(4, seed=seed)
  recipe = recipe_of(
    table,
    rows,
    guidance_scale=scale,
    diversity_coef=beta,
    response_count=response_count,
  )
  found = settled(recipe, beta)
  q = teacher_of(table, scale)
  target = optimum(q, rows @ rows.T, beta)
  np.testing.assert_allclose(found, target, atol=1e-5)
  assert np.abs(target - q).max() > 0.05


def test_two_arms_apart_end_where_lambert_says():
  golden = {
    0: (0.9, 0.18),
    1: (0.760479, 0.364301),
    5: (0.591378, 0.483300),
    10: (0.549922, 0.495016),
    15: (0.534328, 0.497643),
  }
  for q in (np.array([0.9, 0.1]), np.array([0.25, 0.75])):
    table = np.log([q, q])
    for beta in golden if q[0] == 0.9 else (5,):
      recipe = recipe_of(table, np.eye(2), diversity_coef=float(beta))
      p = settled(recipe, beta)
      found = 1 - (p**2).sum()
      if q[0] == 0.9:
        np.testing.assert_allclose((p[0], found), golden[beta], atol=1e-5)
      if beta:  # pi_i = W(2 beta q_i e^c) / (2 beta): one c for all arms
        x = 2 * beta * p
        c = np.log(x * np.exp(x) / (2 * beta * q))
        np.testing.assert_allclose(np.ptp(c), 0, atol=1e-3)
        again = lambertw(2 * beta * q * np.exp(c[0])).real / (2 * beta)
        np.testing.assert_allclose(p, again, atol=1e-4)


def test_equal_embeddings_are_no_reward():
  table = TABLES[0]
  same = np.broadcast_to(vectors(1), (4, 3))
  recipe = recipe_of(table, same, guidance_scale=3.0, diversity_coef=15.0)
  found = settled(recipe, 0.5)
  np.testing.assert_allclose(found, teacher_of(table, 3.0), atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('response_count', [2, 4])
def test_sampled_form(response_count, seed):
  table, beta = TABLES[seed % 2], 2.0
  rows = vectors(4, seed=seed)
  recipe = recipe_of(
    table,
    rows,
    exact=False,
    guidance_scale=2.0,
    diversity_coef=beta,
    response_count=response_count,
  )
  found, _ = bandit.run(
    recipe,
    annealed(0.2, 0.05),
    rows=4096 // response_count,
    steps=250,
    seed=seed,
    fields=UNCOND,
  )
  target = optimum(teacher_of(table, 2.0), rows @ rows.T, beta)
  np.testing.assert_allclose(found, target, atol=1e-2)


# Item 5, T3: the gradient, over all tuples of arms.


def gradient(recipe, rows=2):
  """What a step of rate 1 ascends from the start: the row of the prompt."""
  tx = optimizer(1, algorithm='sgd', b1=0.0, lr=1.0, clip_norm=0.0)
  start = init_state(recipe, tx, 0)
  before = np.asarray(start.params['policy']['logits'][0])
  _, state = bandit.run(recipe, tx, rows=rows, steps=1, fields=UNCOND)
  return np.asarray(state.params['policy']['logits'][0]) - before


def analytic(table, rows, kept=slice(None)):
  """Gradient of D = 1 - pi' G pi in the logits; pi is cut to `kept`."""
  p = np.zeros(len(table[0]))
  p[kept] = softmax(table[0][kept])
  apart = 1 - rows @ rows.T
  far = apart @ p
  return 2 * p * (far - p @ far)


@pytest.mark.parametrize('response_count', [2, 3, 4])
@pytest.mark.parametrize('table, seed', [(TABLES[0], 0), (TABLES[1], 5)])
def test_the_estimator_is_the_gradient(table, seed, response_count):
  # At the start there is no KL, and so the gradient is that of beta D.
  rows = vectors(4, seed=seed)
  recipe = recipe_of(
    table, rows, diversity_coef=1.0, response_count=response_count
  )
  for batch_rows in (1, 2):  # alone a prompt of two has no baseline
    found = gradient(recipe, batch_rows)
    np.testing.assert_allclose(found, analytic(table, rows), atol=2e-6)


@pytest.mark.parametrize('response_count', [2, 3])
@pytest.mark.parametrize('numbers', [{'top_k': 3}, {'top_p': 0.8}])
def test_the_estimator_is_that_of_truncated_answers(numbers, response_count):
  rows, table = vectors(4), TABLES[1]
  numbers |= {'diversity_coef': 1.0, 'response_count': response_count}
  found = gradient(recipe_of(table, rows, **numbers))
  kept = np.argsort(-table[0])[: 3 if 'top_k' in numbers else 2]
  np.testing.assert_allclose(found, analytic(table, rows, kept), atol=2e-6)
  assert np.abs(found - analytic(table, rows)).max() > 0.01


def test_what_cannot_be_drawn_learns_from_the_teacher(monkeypatch):
  table = TABLES[0]
  numbers = {'guidance_scale': 3.0, 'top_k': 2}
  found = settled(recipe_of(table, vectors(4), **numbers), 0.5)
  np.testing.assert_allclose(found, teacher_of(table, 3.0), atol=1e-5)
  # A divergence over what truncation keeps would leave the rest as it was.
  right = module.divergences.reverse
  policy = tabular(table).policy('policy')
  limit = sampled(policy, temperature=1.0, top_k=2).limit
  monkeypatch.setattr(
    module.divergences,
    'reverse',
    lambda p, q: right(p, limit(q, None)),
  )
  found = settled(recipe_of(table, vectors(4), **numbers), 0.5)
  assert np.abs(found - teacher_of(table, 3.0)).max() > 0.05


def wrong(monkeypatch, response_count=2):
  """The gradient, over that of the right estimator."""
  rows = vectors(4)
  numbers = dict(diversity_coef=1.0, response_count=response_count)
  found = gradient(recipe_of(TABLES[0], rows, **numbers))
  return found / analytic(TABLES[0], rows)


@pytest.mark.parametrize('response_count', [2, 3, 4])
def test_a_naive_baseline_is_seen(monkeypatch, response_count):
  monkeypatch.setattr(
    module, 'leave_pairs_out', lambda r, weight, ids: leave_one_out(r, weight)
  )
  ratio = (response_count - 2) / (response_count - 1)
  found = wrong(monkeypatch, response_count)
  np.testing.assert_allclose(found, ratio, atol=1e-4)


@pytest.mark.parametrize('response_count', [2, 3, 4])
def test_pairs_with_oneself_are_seen(monkeypatch, response_count):
  def every(embedding):
    cosine = jnp.einsum('bie,bje->bij', embedding, embedding)
    return jnp.mean(1 - cosine, axis=-1)

  monkeypatch.setattr(rewards, 'to_others', every)
  ratio = (response_count - 1) / response_count
  found = wrong(monkeypatch, response_count)
  np.testing.assert_allclose(found, ratio, atol=1e-4)


def test_a_missing_factor_is_seen(monkeypatch):
  right = module.reinforce
  monkeypatch.setattr(module, 'reinforce', lambda *a: right(*a) / 2)
  np.testing.assert_allclose(wrong(monkeypatch), 0.5, atol=1e-4)


def test_a_wrong_sign_is_seen(monkeypatch):
  right = module.reinforce
  monkeypatch.setattr(module, 'reinforce', lambda *a: -right(*a))
  np.testing.assert_allclose(wrong(monkeypatch), -1, atol=1e-4)


def test_a_moving_teacher_runs_away():
  # Guidance of guidance compounds: only a frozen teacher has a fixed point.
  table = TABLES[0]
  recipe = recipe_of(table, vectors(4), guidance_scale=2.0)
  right = settled(recipe, 0.5, steps=40)
  np.testing.assert_allclose(right, teacher_of(table, 2.0), atol=1e-5)
  copy = Follow('policy', lambda step, leader, me: leader)
  copy = Follow('policy', lambda step, leader, me: leader)
  moving = recipe._replace(follow={'teacher': copy})
  found = settled(moving, 0.5, steps=9)
  assert np.abs(found - right).max() > 0.1 and found.max() > 0.99


def test_the_baseline_lowers_the_variance_and_ignores_its_own_answer():
  rng = np.random.default_rng(0)
  ids = jnp.arange(6) // 2  # every prompt twice in the batch
  for count in (2, 3, 5):
    x = rng.normal(size=(6, count, 3))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    weight = jnp.ones((6, count))
    returns = rewards.to_others(jnp.asarray(x))
    found = module.leave_pairs_out(returns, weight, ids)
    x[0, 0] = x[3, 1]  # another first answer to the first prompt
    changed = rewards.to_others(jnp.asarray(x))
    again = module.leave_pairs_out(changed, weight, ids)
    np.testing.assert_allclose(found[0, 0], again[0, 0], atol=1e-6)
    if count == 2:
      np.testing.assert_allclose(found[0], returns[2:].mean(), atol=1e-6)
      continue
    apart = 1 - np.einsum('bie,bje->bij', x, x)
    for i in range(count):
      pairs = itertools.permutations([j for j in range(count) if j != i], 2)
      mean = np.mean([apart[4, j, k] for j, k in pairs])
      np.testing.assert_allclose(again[4, i], mean, atol=1e-6)


# Item 6: on the line between two runs.


def test_lerp_is_bit_for_bit_at_its_ends_and_logits_in_between():
  ends = [
    bandit.run(
      recipe_of(TABLES[0], vectors(4), guidance_scale=3.0, diversity_coef=beta),
      bandit.natural_gradient(0.1),
      rows=2,
      steps=20,
      fields=UNCOND,
    )[1].params['policy']
    for beta in (0.0, 5.0)
  ]
  for rate, end in zip((0.0, 1.0), ends):
    np.testing.assert_array_equal(
      tree.lerp(*ends, rate)['logits'], end['logits']
    )
  middle = tree.lerp(*ends, 0.25)['logits']
  expected = 0.75 * ends[0]['logits'] + 0.25 * ends[1]['logits']
  np.testing.assert_allclose(middle, expected, atol=1e-6)


@pytest.mark.parametrize(
  'numbers, message',
  [
    ({'diversity_coef': -1.0}, 'recipe.diversity_coef: found -1'),
    ({'diversity_coef': 1.0, 'response_count': 1}, 'recipe.response_count'),
    ({'guidance_scale': float('nan')}, 'recipe.guidance_scale'),
    ({'temperature': 0.0}, 'temperature = 0, top_k = 0 and top_p = 1'),
    ({'top_p': 0.0}, 'top_p = 0: expected more than 0'),
  ],
)
def test_bad_numbers(numbers, message):
  with pytest.raises(UserError, match=message):
    recipe_of(TABLES[0], vectors(4), exact=False, **numbers)


def test_rows_without_a_negative_prompt_are_told():
  recipe = recipe_of(TABLES[0], vectors(4), exact=False, guidance_scale=3.0)
  tx = optimizer(1)
  state = init_state(recipe, tx, 0)
  batch = bandit.prompts(2)
  batch = recipe.stages[0](state.params, batch, jax.random.key(0))
  with pytest.raises(UserError, match='source.uncond'):
    make_step(recipe, tx)(state, batch)
