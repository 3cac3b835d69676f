"""PPO's arithmetic against an independent float64 reference, value and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import value as values
from alignjax.models.tabular import tabular
from alignjax.recipes.ppo import ppo
from tests.parity.test_trl import given

PROMPTS, COUNT, LENGTH = 4, 2, 6
NUMBERS = dict(
  kl_coef=0.1,
  gamma=0.9,
  gae_lambda=0.8,
  clip_low=0.1,
  clip_high=0.3,
  clip_value=0.15,
  value_coef=0.7,
)


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  shape = (PROMPTS, COUNT, LENGTH)
  length = rng.integers(1, LENGTH + 1, shape[:2])
  length[0] = LENGTH, 1
  mask = np.arange(LENGTH) < length[..., None]
  sample = -1.5 - rng.exponential(1.0, shape)
  old = rng.normal(size=shape)
  x = {
    'sample_logp': sample,
    'ref_logp': sample + rng.normal(0, 0.3, shape),
    'logp': sample + rng.normal(0, 0.3, shape),
    'value': old,
    'new_value': old + rng.normal(0, 0.3, shape),
  }
  x = {name: a * mask for name, a in x.items()}
  return x | {'mask': mask, 'reward': rng.normal(size=shape[:2])}


def reference(x, *, whiten):
  """What the papers say, one response and one token at a time, in float64."""
  n, shape = NUMBERS, x['mask'].shape
  advantage, returns = np.zeros(shape), np.zeros(shape)
  for b, i in np.ndindex(*shape[:2]):
    length = x['mask'][b, i].sum()
    r = -n['kl_coef'] * (x['sample_logp'] - x['ref_logp'])[b, i]
    r[length - 1] += x['reward'][b, i]
    v = [*x['value'][b, i, :length], 0.0]
    delta = [r[t] + n['gamma'] * v[t + 1] - v[t] for t in range(length)]
    for t in range(length):
      powers = (n['gamma'] * n['gae_lambda']) ** np.arange(length - t)
      advantage[b, i, t] = powers @ delta[t:]
      returns[b, i, t] = advantage[b, i, t] + v[t]
  mask, count = x['mask'], x['mask'].sum()
  if whiten:
    kept = advantage[mask]
    advantage[mask] = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
  # Losses, with their derivatives by hand.
  ratio = np.exp(x['logp'] - x['sample_logp'])
  stays = np.where(
    advantage > 0, ratio <= 1 + n['clip_high'], ratio >= 1 - n['clip_low']
  )
  kept = np.clip(ratio, 1 - n['clip_low'], 1 + n['clip_high'])
  policy = -np.minimum(ratio * advantage, kept * advantage)
  policy_grad = -ratio * advantage * stays * mask / count
  moved = x['new_value'] - x['value']
  near = x['value'] + np.clip(moved, -n['clip_value'], n['clip_value'])
  plain, clipped = x['new_value'] - returns, near - returns
  larger = plain**2 >= clipped**2
  inside = np.abs(moved) <= n['clip_value']
  regression = np.where(larger, plain**2, clipped**2) / 2
  value_grad = np.where(larger, plain, clipped * inside) * mask / count
  return {
    'advantage': advantage,
    'returns': returns,
    'policy_gradient': policy[mask].mean(),
    'value': regression[mask].mean(),
    'logp_grad': policy_grad,
    'value_grad': n['value_coef'] * value_grad,
    'clipped': (~stays & mask).sum() / count,
  }


def ours(x, *, whiten):
  model = tabular([[0.0]])._replace(
    policy=given,
    scalar=lambda role: lambda bundle, batch: bundle[role],
  )
  recipe = ppo(
    model,
    lambda *_: None,
    whiten_advantage=whiten,
    response_count=COUNT,
    max_new_tokens=LENGTH,
    **NUMBERS,
  )
  batch = {k: jnp.asarray(v, jnp.float32) for k, v in x.items()}
  batch['mask'] = jnp.asarray(x['mask'])
  batch['response'] = jnp.zeros(x['mask'].shape, jnp.int32)
  batch['weight'] = jnp.ones(x['reward'].shape)
  batch['rewards'] = batch['reward'][..., None]
  logp = jnp.where(batch['mask'], batch.pop('logp'), -1.0)
  value = batch.pop('new_value')
  key = jax.random.key(0)
  batch = recipe.stages[-1]({}, batch, key)

  def total(logp, value):
    loss, metrics = recipe.objective(
      {'policy': logp, 'value': value}, batch, key
    )
    total = sum(coef * mean.value for coef, mean in loss.values())
    return total, (loss, metrics)

  grads, (loss, metrics) = jax.grad(total, (0, 1), has_aux=True)(logp, value)
  return {
    'advantage': batch['advantage'],
    'returns': batch['returns'],
    'policy_gradient': loss['policy_gradient'][1].value,
    'value': loss['value'][1].value,
    'logp_grad': grads[0],
    'value_grad': grads[1],
    'clipped': metrics['clipped'].number,
  }


@pytest.mark.parametrize('whiten', [False, True])
@pytest.mark.parametrize('seed', [0, 1])
def test_ppo_is_the_reference(seed, whiten):
  x = arrays(seed)
  want, found = reference(x, whiten=whiten), ours(x, whiten=whiten)
  assert 0.05 < want['clipped'] < 0.95
  moved = np.abs(x['new_value'] - x['value'])[x['mask']]
  assert (moved > NUMBERS['clip_value']).any()
  for name in want:
    np.testing.assert_allclose(found[name], want[name], atol=3e-6, err_msg=name)


def test_ends_of_gae():
  # lambda 1: the discounted return minus the value; lambda 0: one step.
  rewards = jnp.array([[1.0, 2.0, 3.0, 9.0]])
  value = jnp.array([[0.5, 0.25, 0.125, 9.0]])
  mask = jnp.array([[True, True, True, False]])
  whole = values.gae(rewards, value, mask, gamma=1.0, gae_lambda=1.0)
  np.testing.assert_allclose(whole, [[5.5, 4.75, 2.875, 0]], rtol=1e-6)
  one = values.gae(rewards, value, mask, gamma=0.5, gae_lambda=0.0)
  np.testing.assert_allclose(one, [[0.625, 1.8125, 2.875, 0]], rtol=1e-6)


def test_whitened_numbers_ignore_what_has_no_weight():
  x = jnp.array([1.0, 2.0, 6.0, 1e6])
  out = values.whiten(x, jnp.array([1.0, 1.0, 2.0, 0.0]))
  np.testing.assert_allclose(
    out, np.array([-2.75, -1.75, 2.25, 0]) / 5.1875**0.5, rtol=1e-5
  )
  assert not values.whiten(jnp.ones(3), jnp.ones(3)).any()


def test_last_is_the_last_token_even_of_a_full_response():
  mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
  want = [[False, False, True], [True, False, False], [False] * 3]
  np.testing.assert_array_equal(values.last(mask), want)


def test_only_the_value_itself_is_regressed():
  one = jnp.ones(3)
  grads = jax.grad(
    lambda *x: values.clipped_square(*x, clip_value=0.2).sum(), (0, 1, 2)
  )(1.1 * one, one, 3 * one)
  assert grads[0].all() and not grads[1].any() and not grads[2].any()
