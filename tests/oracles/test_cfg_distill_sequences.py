"""CFG distillation along sequences: what flows through sampling, and masks.

A Markov chain: the logits of a token are the row of the token before it. All
sequences of two tokens can be written down, and the gradient of the sequence KL
is exact by differentiating their sum.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import train
from alignjax.core.types import Model, Policy
from alignjax.models.tabular import tabular
from alignjax.recipes import cfg_distill as module
from alignjax.recipes.cfg_distill import cfg_distill
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny

# Rows: after token 0, after token 1, of the prompt 2, of the negative prompt 3.
OWN = np.array([[0.2, -0.3], [-0.6, 0.5], [0.4, 0.1], [0.0, 0.3]])
OTHER = np.array([[1.0, -0.4], [0.3, 0.2], [-0.2, 0.7], [0.5, 0.0]])


def markov(logits) -> Model:
  """A table whose row is the previous token, or at first the prompt's last."""

  def policy(role):
    def features(weights, batch):
      response = batch['response']
      first = jnp.broadcast_to(
        batch['prompt'][:, None, -1:], (*response.shape[:2], 1)
      )
      return weights[jnp.concatenate([first, response[..., :-1]], -1)], {}

    return Policy(
      view=lambda bundle, batch: bundle[role]['logits'],
      features=features,
      head=lambda weights, x: x,
      start=lambda weights, batch, _: (weights[batch['prompt'][:, -1]],) * 2,
      step=lambda weights, cache, tokens: (weights[tokens],) * 2,
      take=lambda cache, rows: cache[rows],
    )

  return tabular(logits)._replace(policy=policy, bare=policy)


SEQUENCES = jnp.array(list(itertools.product(range(2), repeat=3)), jnp.int32)


def exact_kl(own, given, *, through, scale):
  """E_y sum_n KL(own || guided) over the sequences of the table `own`."""
  p = jax.nn.log_softmax(own)
  first = scale * given[2] + (1 - scale) * given[3]
  # Behind the first token both branches read the same row.
  q = jax.nn.log_softmax(given.at[2].set(first))
  kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  rows = jnp.concatenate([jnp.full((8, 1), 2), SEQUENCES[:, :-1]], -1)
  chance = jnp.exp(jnp.sum(p[rows, SEQUENCES], axis=-1))
  if not through:
    chance = jax.lax.stop_gradient(chance)
  return jnp.sum(chance * jnp.sum(kl[rows], axis=-1))


def exactly(model):
  """A stage that writes every sequence of three tokens with its chance."""

  def stage(bundle, batch, key):
    logp = jax.nn.log_softmax(bundle['policy']['logits'])
    rows = jnp.concatenate([jnp.full((8, 1), 2), SEQUENCES[:, :-1]], -1)
    logp = logp[rows, SEQUENCES]
    batch = {name: jnp.repeat(x, 8, axis=0) for name, x in batch.items()}
    return batch | {
      'response': SEQUENCES[:, None],
      'mask': jnp.ones((8, 1, 3), bool),
      'sample_logp': logp[:, None],
      'weight': jnp.exp(logp.sum(-1))[:, None],
    }

  return stage


def gradient(recipe, rows=1, seed=0):
  tx = optimizer(1, algorithm='sgd', b1=0.0, lr=1.0, clip_norm=0.0)
  given = {'logits': jnp.asarray(OTHER, jnp.float32)}
  state = init_state(recipe, tx, seed, start={'teacher': given})
  batch = {
    'id': jnp.arange(rows, dtype=jnp.int32),
    'prompt': jnp.full((rows, 1), 2),
    'uncond': jnp.full((rows, 1), 3),
  }
  batch = train.stage_batch(recipe, state, batch, seed)
  after, _ = jax.jit(make_step(recipe, tx))(state, batch)
  return np.asarray(
    state.params['policy']['logits'] - after.params['policy']['logits']
  )


def recipe_of(**numbers):
  model = markov(OWN)
  numbers = dict(guidance_scale=2.0, max_new_tokens=3) | numbers
  return cfg_distill(model, model, **numbers)


@pytest.mark.parametrize('scale', [1.0, 2.0])
@pytest.mark.parametrize('through', [False, True])
def test_the_gradient_with_and_without_sampling(through, scale):
  recipe = recipe_of(grad_through_sampling=through, guidance_scale=scale)
  found = gradient(recipe._replace(stages=(exactly(OWN),)))
  both = [
    jax.grad(exact_kl)(
      jnp.asarray(OWN), jnp.asarray(OTHER), through=x, scale=scale
    )
    for x in (False, True)
  ]
  np.testing.assert_allclose(found, both[through], atol=1e-6)
  # They differ in the first logits, and not at all in a last step.
  assert np.abs(both[0] - both[1])[2].max() > 0.02


def test_sampled_gradient_through_sampling():
  recipe = recipe_of(grad_through_sampling=True, response_count=4)
  found = np.mean([gradient(recipe, 50_000, seed) for seed in range(2)], axis=0)
  target = jax.grad(exact_kl)(
    jnp.asarray(OWN), jnp.asarray(OTHER), through=True, scale=2.0
  )
  np.testing.assert_allclose(found, target, atol=4e-3)


def test_what_comes_at_the_token_itself_is_not_later(monkeypatch):
  def inclusive(x):
    return jnp.cumsum(x[..., ::-1], axis=-1)[..., ::-1]

  # A token's own KL is no consequence of it: same mean, so only the sampled
  # gradient is noisier; a sum from the wrong end is another gradient.
  def earlier(x):
    return jnp.cumsum(x, axis=-1) - x

  target = jax.grad(exact_kl)(
    jnp.asarray(OWN), jnp.asarray(OTHER), through=True, scale=2.0
  )
  for later, same in ((inclusive, True), (earlier, False)):
    monkeypatch.setattr(module, '_later', later)
    recipe = recipe_of(grad_through_sampling=True)
    found = gradient(recipe._replace(stages=(exactly(OWN),)))
    assert (np.abs(found - target).max() < 1e-5) == same


def staged(model, recipe, **fields):
  bundle = {
    role: jax.jit(init)(jax.random.key(i))
    for i, (role, init) in enumerate(recipe.init.items())
  }
  batch = tiny.batch(4)
  batch |= {'uncond': jnp.roll(batch['prompt'], 1, axis=0)} | fields
  for i, stage in enumerate(recipe.stages):
    batch = stage(bundle, batch, jax.random.key(i))
  return bundle, batch


def test_nothing_behind_the_end_counts():
  model = tiny.model(layers=1)
  recipe = cfg_distill(model, model, diversity_coef=5.0, max_new_tokens=6)
  bundle, batch = staged(model, recipe)
  batch['mask'] = batch['mask'].at[:, 0, 4:].set(False)
  batch['sample_logp'] *= batch['mask']
  objective = jax.jit(recipe.objective)

  def total(batch):
    for stage in recipe.stages[1:]:
      batch = stage(bundle, batch, jax.random.key(0))
    loss, _ = objective(bundle, batch, None)
    return [float(mean.value) for _, mean in loss.values()]

  right = total(batch)
  junk = batch['response'].at[:, 0, 4:].set(99)
  other = total(batch | {'response': junk})
  np.testing.assert_allclose(other, right, rtol=1e-5)
  # Without the mask what is behind the end would be paid for.
  longer = total(batch | {'mask': jnp.ones_like(batch['mask'])})
  assert abs(longer[0] - right[0]) > 1e-2
  # The sum over tokens, not their mean: equation 2.
  expected = equation_2(model, bundle, batch)
  assert right[0] == pytest.approx(expected, rel=1e-4)


def equation_2(model, bundle, batch):
  """The sum over a response's tokens, mean over responses, at scale 3."""
  logits = []
  for role, field in (
    ('policy', 'prompt'),
    ('teacher', 'prompt'),
    ('teacher', 'uncond'),
  ):
    policy = model.policy(role)
    rows = batch | {'prompt': batch[field]}
    weights = policy.view(bundle, rows)
    logits.append(policy.head(weights, policy.features(weights, rows)[0]))
  own, cond, uncond = (np.asarray(x, np.float64) for x in logits)
  logp = np.asarray(jax.nn.log_softmax(own))
  given = np.asarray(jax.nn.log_softmax(3 * cond - 2 * uncond))
  kl = (np.exp(logp) * (logp - given)).sum(-1)
  return float((kl * np.asarray(batch['mask'])).sum(-1).mean())


def test_microbatches_change_nothing():
  model = tiny.model(layers=1)
  recipe = cfg_distill(
    model,
    model,
    diversity_coef=5.0,
    max_new_tokens=5,
    response_count=3,
    grad_through_sampling=True,
  )
  tx = optimizer(1, algorithm='sgd', lr=0.1, clip_norm=0.0)
  state = init_state(recipe, tx, 0)
  batch = tiny.batch(4)
  batch['uncond'] = jnp.roll(batch['prompt'], 1, axis=0)
  batch = train.stage_batch(recipe, state, batch, 0)
  found = [
    jax.jit(make_step(recipe, tx, microbatches=m))(state, batch)[0]
    for m in (1, 4)
  ]
  for a, b in zip(*(jax.tree.leaves(s.params) for s in found)):
    np.testing.assert_allclose(a, b, atol=4e-6)


@pytest.mark.parametrize(
  'numbers', [{'temperature': 0.5, 'top_k': 5}, {'top_p': 0.3}]
)
def test_temperature_and_truncation_are_of_the_draws(numbers):
  # KL of whole distributions; the sampler's log-probabilities are its own.
  model = tiny.model(layers=1)
  recipe = cfg_distill(model, model, max_new_tokens=6, **numbers)
  bundle, batch = staged(model, recipe)
  loss, metrics = jax.jit(recipe.objective)(bundle, batch, None)
  assert float(metrics['logprob_gap'].value) < 1e-4
  expected = equation_2(model, bundle, batch)
  found = float(loss['distillation'][1].value)
  assert found == pytest.approx(expected, rel=1e-4)
