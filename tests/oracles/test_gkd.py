"""GKD: optima on what the student draws, and which way each divergence leans.

Two prompts share one row of the student's table but not of the teacher's: no
student is both teachers, and every divergence has an optimum of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from alignjax import train
from alignjax.core.errors import UserError
from alignjax.core.types import Model
from alignjax.losses.divergence import kl
from alignjax.models.tabular import tabular
from alignjax.policies.combine import under_guidance
from alignjax.recipes import gkd as file
from alignjax.recipes.distill import distill
from alignjax.recipes.gkd import gkd
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny
from tests.oracles import bandit

PAIRS = [
  np.array([[0.7, 0.2, 0.08, 0.02], [0.05, 0.15, 0.2, 0.6]]),
  np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.05, 0.65, 0.05]]),
]


def shared(logits) -> Model:
  """A table whose first row answers every prompt."""
  model = tabular(logits)

  def policy(role):
    bare = model.policy(role)
    return bare._replace(
      view=lambda bundle, batch: jnp.broadcast_to(
        bare.view(bundle, batch)[:1], (2, len(logits[0]))
      )
    )

  return model._replace(policy=policy)


def rows(count, **fields):
  return {
    'id': jnp.arange(count, dtype=jnp.int32),
    'prompt': jnp.arange(count, dtype=jnp.int32)[:, None] % 2,
  } | fields


def run(recipe, tx, steps, batch=None, seed=0):
  state = init_state(recipe, tx, seed)
  step = jax.jit(make_step(recipe, tx, seed=seed))
  for _ in range(steps):
    staged = train.stage_batch(recipe, state, batch or rows(4), seed)
    state, metrics = step(state, staged)
  return bandit.probabilities(state.params['policy']), metrics, state


def jensen_shannon(p, q, mix):
  m = mix * p + (1 - mix) * q
  to_p = (p * np.log(p / m)).sum(-1)
  return mix * to_p + (1 - mix) * (q * np.log(q / m)).sum(-1)


def best(teachers, mix):
  """The student closest to both teachers in Jensen-Shannon, in float64."""

  def total(z):
    return jensen_shannon(teachers, softmax(z), mix).mean()

  found = minimize(total, np.zeros(4), method='BFGS', options={'gtol': 1e-10})
  return softmax(found.x)


def geometric(teachers):
  return softmax(np.log(teachers).mean(0))


@pytest.mark.parametrize('teachers', PAIRS)
@pytest.mark.parametrize(
  'divergence, mix, target',
  [
    ('forward', 0.5, lambda p: p.mean(0)),
    ('reverse', 0.5, geometric),
    ('jensen_shannon', 0.1, lambda p: best(p, 0.1)),
    ('jensen_shannon', 0.5, lambda p: best(p, 0.5)),
    ('jensen_shannon', 0.9, lambda p: best(p, 0.9)),
  ],
)
def test_optimum_between_two_teachers(divergence, mix, target, teachers):
  recipe = gkd(
    shared(np.zeros((1, 4))),
    tabular(np.log(teachers)),
    divergence=divergence,
    mix=mix,
    max_new_tokens=3,
  )
  rate = 1 / (mix * (1 - mix)) if divergence == 'jensen_shannon' else 2.0
  tx = optimizer(400, algorithm='sgd', lr=rate, clip_norm=0.0)
  found, metrics, state = run(recipe, tx, 400)
  np.testing.assert_allclose(found, target(teachers), atol=1e-5)
  # Frozen: what the teacher is does not move.
  np.testing.assert_array_equal(
    state.frozen['teacher']['logits'], np.log(teachers).astype(np.float32)
  )
  assert metrics['logprob_gap'].number < 1e-5


def test_the_optima_lie_apart():
  for teachers in PAIRS:
    found = [
      teachers.mean(0),
      best(teachers, 0.1),
      best(teachers, 0.5),
      best(teachers, 0.9),
      geometric(teachers),
    ]
    for a, b in zip(found, found[1:]):
      assert np.abs(a - b).max() > 1e-3
    # And those of the mix go from one limit to the other.
    np.testing.assert_allclose(best(teachers, 1e-3), found[0], atol=2e-3)
    np.testing.assert_allclose(best(teachers, 1 - 1e-3), found[-1], atol=2e-3)


@pytest.mark.parametrize('divergence', ['forward', 'reverse', 'jensen_shannon'])
def test_one_teacher_is_the_optimum_of_all(divergence):
  for target in (bandit.REF, bandit.best_of(bandit.REF, 2)):
    recipe = gkd(
      tabular(np.zeros((2, 5))),
      tabular(np.log([target, target])),
      divergence=divergence,
      max_new_tokens=2,
    )
    found, _, _ = run(recipe, bandit.natural_gradient(0.5), 400)
    np.testing.assert_allclose(found, target, atol=1e-5)


def guided(model: Model, scale: float) -> Model:
  """A model whose roles are under guidance."""
  return model._replace(policy=lambda role: under_guidance(model, role, scale))


@pytest.mark.parametrize('scale', [0.0, 1.0, 1.5, 3.0])
def test_a_guided_teacher_ends_in_the_weights(scale):
  # T1: pi = softmax(scale l_c + (1 - scale) l_u), by reverse KL.
  logits = np.array([[1.0, 0.3, -0.2, 0.1], [0.2, 0.4, 0.1, -0.3]])
  recipe = gkd(
    tabular(logits),
    guided(tabular(logits), scale),
    divergence='reverse',
    max_new_tokens=2,
  )
  batch = {
    'id': jnp.arange(4),
    'prompt': jnp.zeros((4, 1), jnp.int32),
    'uncond': jnp.ones((4, 1), jnp.int32),
  }
  found, _, _ = run(recipe, bandit.natural_gradient(0.5), 100, batch)
  target = softmax(scale * logits[0] + (1 - scale) * logits[1])
  np.testing.assert_allclose(found, target, atol=1e-5)
  logp = log_softmax(logits, -1)
  np.testing.assert_allclose(
    target, softmax(scale * logp[0] + (1 - scale) * logp[1]), atol=1e-12
  )


def given(count, length=3):
  response = jnp.arange(count * length).reshape(count, 1, length) % 4
  return {
    'response': response.astype(jnp.int32),
    'mask': jnp.ones((count, 1, length), bool),
  }


def test_given_responses_only_is_plain_distillation():
  model, other = tabular(np.zeros((2, 4))), tabular(np.log(PAIRS[0]))
  tx = optimizer(1, algorithm='sgd', lr=1.0, clip_norm=0.0)
  batch = rows(4, **given(4))
  off = gkd(model, other, divergence='forward', on_policy=0.0)
  found, metrics, _ = run(off, tx, 1, batch)
  plain, expected, _ = run(distill(model, other), tx, 1, batch)
  np.testing.assert_allclose(found, plain, atol=1e-7)
  assert metrics['loss/forward'].number == pytest.approx(
    expected['loss/kl'].number, rel=1e-6
  )
  assert metrics['drawn'].number == 0 and metrics['logprob_gap'].number == 0


def test_a_share_of_the_rows_is_drawn():
  model = tiny.model(layers=1)
  recipe = gkd(model, model, on_policy=0.3, max_new_tokens=5)
  bundle = tiny.bundle(model, 'policy', 'teacher')
  batch = tiny.batch(64) | given(64)
  (stage,) = recipe.stages
  out = stage(bundle, batch, jax.random.key(0))
  assert out['response'].shape == (64, 1, 5)
  own = np.asarray(jnp.any(out['sample_logp'] != 0, axis=(1, 2)))
  assert 0.15 < own.mean() < 0.45
  np.testing.assert_array_equal(
    out['response'][~own][..., :3], batch['response'][~own]
  )
  assert not np.asarray(out['mask'][~own])[..., 3:].any()
  # A row's toss does not depend on the batch that it is in.
  half = stage(bundle, {k: x[::2] for k, x in batch.items()}, jax.random.key(0))
  np.testing.assert_array_equal(half['response'], out['response'][::2])
  loss, metrics = recipe.objective(bundle, out, None)
  assert float(metrics['drawn'].value) == pytest.approx(own.mean())
  assert float(metrics['logprob_gap'].value) < 1e-4
  assert float(loss['jensen_shannon'][1].value) > 0


def test_rows_without_a_response_are_told():
  model = tabular(np.zeros((2, 4)))
  recipe = gkd(model, model, on_policy=0.5)
  with pytest.raises(UserError, match='set response_tokens'):
    run(recipe, optimizer(1), 1)


def test_answers_count_alike_whatever_their_length():
  # Equation 2: the mean over a response's tokens, then over responses.
  model, other = tabular(np.zeros((2, 4))), tabular(np.log(PAIRS[0]))
  batch = rows(2, **given(2))
  batch['mask'] = batch['mask'].at[0, 0, 1:].set(False)
  recipe = gkd(model, other, divergence='forward', on_policy=0.0)
  state = init_state(recipe, optimizer(1), 0)
  staged = train.stage_batch(recipe, state, batch, 0)
  loss, _ = recipe.objective({**state.params, **state.frozen}, staged, None)
  each = (PAIRS[0] * np.log(PAIRS[0] * 4)).sum(-1)
  assert float(loss['forward'][1].value) == pytest.approx(each.mean(), rel=1e-5)


def test_microbatches_change_nothing():
  model = tiny.model(layers=1)
  recipe = gkd(
    model, tiny.model(layers=1, width=48, vocab_size=288), max_new_tokens=6
  )
  tx = optimizer(1, algorithm='sgd', lr=1.0)
  state = init_state(recipe, tx, 0)
  batch = train.stage_batch(recipe, state, tiny.batch(4), 0)
  found = [
    jax.jit(make_step(recipe, tx, microbatches=m))(state, batch) for m in (1, 4)
  ]
  for a, b in zip(*(jax.tree.leaves(s.params) for s, _ in found)):
    np.testing.assert_allclose(a, b, atol=4e-6)
  losses = [m['loss/jensen_shannon'].number for _, m in found]
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_swapped_direction_is_seen(monkeypatch):
  monkeypatch.setattr(file.divergences, 'kl', lambda p, q: kl(q, p))
  recipe = gkd(
    shared(np.zeros((1, 4))), tabular(np.log(PAIRS[0])), divergence='forward'
  )
  tx = optimizer(400, algorithm='sgd', lr=2.0, clip_norm=0.0)
  found, _, _ = run(recipe, tx, 400)
  assert np.abs(found - PAIRS[0].mean(0)).max() > 5e-3


@pytest.mark.parametrize(
  'numbers, message',
  [
    ({'divergence': 'jsd'}, "found 'jsd'"),
    ({'mix': 1.0}, 'recipe.mix: found 1.0'),
    ({'on_policy': 1.5}, 'recipe.on_policy: found 1.5'),
  ],
)
def test_bad_numbers(numbers, message):
  model = tabular(np.zeros((2, 4)))
  with pytest.raises(UserError, match=message):
    gkd(model, model, **numbers)
