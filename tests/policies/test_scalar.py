"""The scalar head: aligned with tokens, blind to what follows, at home."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.losses.logprob import token_logp
from alignjax.models import sharding
from alignjax.recipes.ppo import ppo
from alignjax.stages.score import values
from alignjax.step import init_state
from alignjax.system.optimizer import optimizer
from tests import tiny

MODEL = tiny.model()


def value_role(seed=0):
  params = jax.jit(MODEL.scalar_init)(jax.random.key(seed))
  head = params['scalar_head']
  assert not head.any()  # values start at 0
  return params | {
    'scalar_head': jax.random.normal(jax.random.key(1), head.shape)
  }


def batch_of(length=6):
  rng = np.random.default_rng(0)
  return tiny.batch(4) | {
    'response': jnp.asarray(rng.integers(6, 262, (4, 2, length)), jnp.int32),
    'mask': jnp.ones((4, 2, length), bool),
  }


def test_a_value_sees_what_precedes_its_token_and_nothing_else():
  bundle, batch = {'value': value_role()}, batch_of()
  scalar = jax.jit(MODEL.scalar('value'))
  found = scalar(bundle, batch)
  assert found.shape == (4, 2, 6) and found.dtype == jnp.float32
  changed = batch['response'].at[:, :, 3].set(7)
  other = scalar(bundle, batch | {'response': changed})
  np.testing.assert_allclose(other[..., :4], found[..., :4], atol=1e-5)
  assert (jnp.abs(other - found)[..., 4:] > 1e-4).any()
  prompt = batch['prompt'].at[:, -1].set(9)
  assert (scalar(bundle, batch | {'prompt': prompt}) != found)[..., 0].all()


def test_values_are_zero_behind_the_end():
  batch = batch_of()
  batch['mask'] = batch['mask'].at[:, :, 4:].set(False)
  out = values(MODEL.scalar('value'))(
    {'value': value_role()}, batch, jax.random.key(0)
  )
  assert out['value'][..., :4].all() and not out['value'][..., 4:].any()


def test_the_net_below_the_head_is_that_of_the_policy():
  plain = jax.jit(MODEL.init)(jax.random.key(0))
  scalar = dict(jax.jit(MODEL.scalar_init)(jax.random.key(0)))
  assert scalar.pop('scalar_head').shape == (tiny.config().width, 1)
  jax.tree.map(np.testing.assert_array_equal, plain, scalar)
  for name, leaf in tree.named(value_role()).items():
    sharding.spec(name, leaf)


@pytest.mark.parametrize('origin', ['@policy', 'given'])
def test_a_value_role_starts_from_a_language_model(origin):
  recipe = ppo(MODEL, tiny.evenness, max_new_tokens=4)
  policy = jax.jit(MODEL.init)(jax.random.key(7))
  start = {'policy': policy, 'reference': '@policy', 'value': origin}
  if origin == 'given':
    start['value'] = policy
  state = init_state(recipe, optimizer(1), 0, start=start)
  value = dict(state.params['value'])
  assert not value.pop('scalar_head').any()
  jax.tree.map(np.testing.assert_array_equal, value, state.params['policy'])
  assert set(state.frozen['reference']) == set(state.params['policy'])


def test_a_fixed_role_is_not_given_a_head():
  # Its numbers would all be 0, and nothing would ever train it.
  recipe = ppo(MODEL, tiny.evenness, max_new_tokens=4)
  fixed = recipe._replace(follow={'reference': None, 'value': None})
  plain = jax.jit(MODEL.init)(jax.random.key(7))
  for origin in ('@policy', plain):
    with pytest.raises(UserError, match='start.value: .* no scalar_head'):
      init_state(fixed, optimizer(1), 0, start={'value': origin})
  given = {'value': value_role()}
  state = init_state(fixed, optimizer(1), 0, start=given)
  assert state.frozen['value']['scalar_head'].any()


def test_a_table_gives_the_value_role_its_own_learning_rate():
  recipe = ppo(MODEL, tiny.evenness, max_new_tokens=4)
  table = (('value/.*', 0.5), ('.*', 1.0))
  tx = optimizer(1, algorithm='sgd', b1=0.0, lr=0.1, clip_norm=0, table=table)
  state = init_state(recipe, tx, 0)
  ones = jax.tree.map(jnp.ones_like, state.params)
  updates, _ = tx.update(ones, state.opt_state, state.params)
  for name, update in tree.named(updates).items():
    want = -0.05 if name.startswith('value/') else -0.1
    np.testing.assert_allclose(update, want, rtol=1e-6)


def test_bfloat16_leaves_the_head_in_float32():
  model = tiny.model(dtype='bfloat16')
  bundle, batch = {'value': value_role()}, batch_of()
  exact = MODEL.scalar('value')(bundle, batch)
  rounded = model.scalar('value')(bundle, batch)
  assert rounded.dtype == jnp.float32
  scale = float(jnp.abs(exact).max())
  np.testing.assert_allclose(rounded, exact, atol=0.05 * scale)
  logp = token_logp(
    model.policy('value'), model.policy('value').view(bundle, batch), batch
  )
  assert jnp.isfinite(logp).all()
