"""BOND with a learned quantile: the classifier, and the policy it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import train
from alignjax.losses.value import of_response
from alignjax.recipes import bond as module
from alignjax.stages.rollout import enumerate_arms
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny
from tests.oracles import bandit
from tests.oracles.test_bond import without_b

F1 = dict(ref=bandit.REF, rewards=bandit.REWARD)
OTHER = dict(ref=bandit.OTHER_REF, rewards=bandit.OTHER_REWARD)


def recipe_of(
  n=2, weight=0.5, *, exact=True, ref=bandit.REF, rewards=bandit.REWARD, **more
):
  model = bandit.model(ref)
  recipe = module.bond(
    model,
    bandit.reward(rewards),
    n=n,
    jeffreys_weight=weight,
    quantile='learned',
    max_new_tokens=1,
    baseline='none' if exact else 'leave_one_out',
    **more,
  )
  if exact:
    draws = [(model.policy('policy'), 1), (model.policy('anchor'), n)]
    arms = enumerate_arms(draws, arms=len(ref), support=True)
    recipe = recipe._replace(stages=(arms, *recipe.stages[1:]))
  return recipe


def both(lr):
  """Natural gradients of the policy's table and of the classifier's."""
  policy = bandit.natural_gradient(lr)

  def update(updates, state, params):
    step = lr(state) if callable(lr) else lr
    p = jax.nn.softmax(params['policy']['logits'], axis=-1)
    s = jax.nn.sigmoid(params['quantile']['after'])
    fisher = p * jnp.maximum(s * (1 - s), 1e-6)
    moved, state = policy.update(updates, state, params)
    after = -step * updates['quantile']['after'] / fisher
    return moved | {'quantile': moved['quantile'] | {'after': after}}, state

  return optax.GradientTransformation(policy.init, update)


def classifier(state):
  return np.asarray(jax.nn.sigmoid(state.params['quantile']['after'][0]))


@pytest.mark.parametrize('fixture', [F1, OTHER], ids=['F1', 'other'])
@pytest.mark.parametrize('n', [2, 4])
@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
def test_exact_quantiles_and_their_policy(fixture, n, weight):
  recipe = recipe_of(n, weight, **fixture)
  found, state = bandit.run(recipe, both(0.5), rows=1, steps=120)
  _, upto = bandit.quantiles(*fixture.values())
  np.testing.assert_allclose(classifier(state), upto, atol=1e-5)
  if weight == 0:
    target = bandit.best_of(fixture['ref'], n, fixture['rewards'])
  else:
    target = without_b(n, weight, **fixture)
  np.testing.assert_allclose(found, target, atol=1e-5)


def test_many_arms_are_nearly_best_of_n():
  # What log p_<= leaves out is constant where no arm has much probability.
  arms = 24
  ref, rewards = np.full(arms, 1 / arms), np.arange(arms) ** 2.0
  recipe = recipe_of(2, 0.5, ref=ref, rewards=rewards)
  found, state = bandit.run(recipe, both(0.5), rows=1, steps=120)
  np.testing.assert_allclose(
    classifier(state), np.arange(1, arms + 1) / arms, atol=1e-5
  )
  target = bandit.best_of(ref, 2, rewards)
  assert 0.5 * np.abs(found - target).sum() < 0.01


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sampled_form(seed):
  # One draw y' per prompt: a target that is 0 or 1.
  def rate(step):
    return 0.5 / (1 + 0.2 * step)

  recipe = recipe_of(exact=False)
  found, state = bandit.run(recipe, both(rate), rows=4096, steps=100, seed=seed)
  np.testing.assert_allclose(found, without_b(2, 0.5), atol=1e-2)
  _, upto = bandit.quantiles(bandit.REF)
  np.testing.assert_allclose(classifier(state)[1:], upto[1:], atol=2e-2)


def test_the_configured_optimizer_gets_there_too():
  table = (('quantile/.*', 4.0), ('.*', 1.0))
  tx = optimizer(3000, lr=0.05, schedule='linear', clip_norm=0.0, table=table)
  found, state = bandit.run(recipe_of(), tx, rows=1, steps=3000)
  np.testing.assert_allclose(found, without_b(2, 0.5), atol=1e-4)
  _, upto = bandit.quantiles(bandit.REF)
  np.testing.assert_allclose(classifier(state), upto, atol=1e-3)


def test_the_classifier_follows_a_replaced_anchor():
  recipe = recipe_of(2, 0.0, anchor_period=80)
  found, state = bandit.run(recipe, both(0.5), rows=1, steps=159)
  _, upto = bandit.quantiles(bandit.best_of(bandit.REF, 2))
  np.testing.assert_allclose(classifier(state), upto, atol=1e-5)
  np.testing.assert_allclose(found, bandit.best_of(bandit.REF, 4), atol=1e-5)


def test_a_turned_label_is_detected(monkeypatch):
  right = module.quantile_nll
  monkeypatch.setattr(
    module, 'quantile_nll', lambda logit, upto: right(logit, 1 - upto)
  )
  found, state = bandit.run(recipe_of(), both(0.1), rows=1, steps=60)
  _, upto = bandit.quantiles(bandit.REF)
  assert np.abs(classifier(state) - upto).max() > 0.3
  assert np.abs(found - without_b(2, 0.5)).max() > 0.05


def test_a_classifier_that_misses_the_last_token_is_detected(monkeypatch):
  def short(scalar, bundle, batch):
    return scalar(bundle, batch)[..., -1]

  monkeypatch.setattr(module, 'of_response', short)
  found, _ = bandit.run(
    recipe_of(2, 1.0), bandit.natural_gradient(0.3), rows=1, steps=60
  )
  assert np.abs(found - without_b(2, 1.0)).max() > 0.05


def test_no_gradient_of_the_policy_reaches_the_classifier():
  # The backward term sees the quantile as a number.
  recipe = recipe_of()
  state = init_state(recipe, both(0.5), 0)
  batch = train.stage_batch(recipe, state, bandit.prompts(1), 0)

  def loss(params):
    terms, _ = recipe.objective({**params, **state.frozen}, batch, None)
    return sum(terms[name][1].value for name in ('forward', 'backward'))

  grads = jax.jit(jax.grad(loss))(state.params)
  assert np.abs(grads['policy']['logits']).max() > 0.01
  assert not np.any(grads['quantile']['after'])


def test_a_decoder_learns_quantiles():
  recipe = module.bond(
    tiny.model(layers=1),
    tiny.evenness,
    n=2,
    quantile='learned',
    max_new_tokens=4,
  )
  tx = optimizer(30, lr=1e-2)
  state = init_state(recipe, tx, 0, start={'quantile': '@policy'})
  step = jax.jit(make_step(recipe, tx))
  source, losses = tiny.prompt_source(batch_size=16), []
  for k in range(30):
    batch = jax.tree.map(jnp.asarray, source.batch(k))
    batch = train.stage_batch(recipe, state, batch, 0)
    state, metrics = step(state, batch)
    losses.append(metrics['loss/quantile'].number)
  assert losses[0] == pytest.approx(np.log(2), rel=1e-3)  # a head of zeros
  assert np.mean(losses[-10:]) < losses[0] - 0.05


def test_the_number_of_a_response_has_read_its_last_token():
  model = tiny.model(layers=1)
  params = jax.jit(model.scalar_init)(jax.random.key(0))
  head = jax.random.normal(jax.random.key(1), params['scalar_head'].shape)
  bundle = {'quantile': dict(params) | {'scalar_head': head}}
  scalar = jax.jit(
    lambda batch: of_response(model.scalar('quantile'), bundle, batch)
  )
  response = np.full((8, 1, 5), 40, np.int32)
  mask = np.ones((8, 1, 5), bool)
  batch = tiny.batch() | {'response': response, 'mask': mask}
  whole = scalar(batch)
  changed = response.copy()
  changed[..., -1] = 41
  assert np.abs(scalar(batch | {'response': changed}) - whole).min() > 1e-4
  # What follows the end of a shorter response is not read.
  cut = batch | {'mask': mask & (np.arange(5) < 3)}
  short = batch | {'response': response[..., :3], 'mask': mask[..., :3]}
  np.testing.assert_allclose(scalar(cut), scalar(short), atol=1e-5)
