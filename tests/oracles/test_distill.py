"""Distillation: the loss is the dense KL, and its optimum is the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.tabular import tabular
from alignjax.recipes import distill as file
from alignjax.recipes.distill import distill
from alignjax.step import init_state, make_step
from alignjax.system.optimizer import optimizer
from tests import tiny
from tests.test_train import text_source


def batch():
  return jax.tree.map(jnp.asarray, text_source(batch_size=4).batch(0))


def test_the_loss_is_the_dense_kl_under_the_mask(monkeypatch):
  model = tiny.model()
  bundle, rows = tiny.bundle(model, 'policy', 'teacher'), batch()
  rows['loss_mask'] = rows['loss_mask'].at[1::2, 5:].set(False)
  logp = []
  for role in ('teacher', 'policy'):
    policy = model.policy(role)
    weights = policy.view(bundle, rows)
    logits = policy.head(weights, policy.features(weights, rows)[0])
    logp.append(np.asarray(jax.nn.log_softmax(logits), np.float64))
  dense = np.sum(np.exp(logp[0]) * (logp[0] - logp[1]), axis=-1)
  inside = rows['segment'][:, 1:] == rows['segment'][:, :-1]
  mask = np.asarray(rows['loss_mask'][:, 1:] & inside)
  over_tokens = file.over_tokens
  for chunk in (256, 7):
    monkeypatch.setattr(
      file,
      'over_tokens',
      lambda *args, chunk=chunk: over_tokens(*args, chunk=chunk),
    )
    loss, metrics = distill(model).objective(bundle, rows, None)
    mean = loss['kl'][1]
    assert float(mean.weight) == mask.sum()
    assert float(mean.value) == pytest.approx(dense[mask].mean(), rel=1e-5)
  own = np.take_along_axis(
    logp[1], np.asarray(rows['tokens'])[:, 1:, None], axis=-1
  )
  nll = -own[..., 0][mask].mean()
  assert float(metrics['nll'].value) == pytest.approx(nll, rel=1e-5)


def test_a_policy_that_is_its_teacher_has_nothing_to_learn():
  recipe, tx = distill(tiny.model()), optimizer(1, algorithm='sgd', lr=1.0)
  state = init_state(recipe, tx, 0, start={'teacher': '@policy'})
  after, metrics = jax.jit(make_step(recipe, tx))(state, batch())
  assert abs(metrics['loss/kl'].number) < 1e-6
  assert metrics['agreement'].number == 1
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(after.params)):
    np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, state.frozen, after.frozen)


def test_the_optimum_is_the_teacher():
  target = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
  recipe = distill(tabular(np.zeros((2, 4))))
  tx = optimizer(300, algorithm='sgd', lr=4.0, clip_norm=0.0)
  teacher = {'logits': jnp.log(jnp.asarray(target, jnp.float32))}
  state = init_state(recipe, tx, 0, start={'teacher': teacher})
  step = jax.jit(make_step(recipe, tx, microbatches=2))
  rows = {
    'id': jnp.arange(4),
    'prompt': jnp.array([[0], [1], [1], [0]]),
    'response': jnp.zeros((4, 1, 1), jnp.int32),
    'mask': jnp.ones((4, 1, 1), bool),
  }
  for _ in range(300):
    state, metrics = step(state, rows)
  found = jax.nn.softmax(state.params['policy']['logits'])
  np.testing.assert_allclose(found, target, atol=1e-5)
  assert metrics['loss/kl'].number < 1e-6
