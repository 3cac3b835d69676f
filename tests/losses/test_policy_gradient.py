"""Surrogates, group advantages, estimates of the KL: by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import policy_gradient as losses

CLIP = dict(clip_low=0.2, clip_high=0.3)
P = np.array([0.1, 0.2, 0.3, 0.4])
REF = np.array([0.25, 0.15, 0.4, 0.2])


@pytest.mark.parametrize(
  'ratio, advantage, loss, slope',
  [
    (1.0, 2.0, -2.0, -2.0),
    (1.2, 2.0, -2.4, -2.4),
    (1.5, 2.0, -2.6, 0.0),  # gone up far enough
    (0.5, 2.0, -1.0, -1.0),  # a good action that became rarer: pulled back
    (0.5, -2.0, 1.6, 0.0),
    (1.5, -2.0, 3.0, 3.0),
    (1.0, 0.0, 0.0, 0.0),
  ],
)
def test_surrogate(ratio, advantage, loss, slope):
  log_ratio, advantage = jnp.log(ratio), jnp.float32(advantage)

  def fn(x, a):
    return losses.surrogate(x, a, **CLIP)

  np.testing.assert_allclose(fn(log_ratio, advantage), loss, rtol=1e-6)
  grads = jax.grad(fn, (0, 1))(log_ratio, advantage)
  np.testing.assert_allclose(grads[0], slope, rtol=1e-6, atol=1e-7)
  assert grads[1] == 0  # advantages carry no gradient
  far = losses.clipped(log_ratio, advantage, **CLIP)
  assert bool(far) == (slope == 0 and advantage != 0)


@pytest.mark.parametrize(
  'name, mean, descends',
  [
    ('k1', 'reverse', None),
    ('k2', None, 'reverse'),
    ('k3', 'reverse', 'forward'),
  ],
)
def test_estimates_of_the_kl(name, mean, descends):
  """The mean under pi and, with drawn tokens fixed, its gradient."""
  estimate = getattr(losses, name)
  reverse = np.sum(P * np.log(P / REF))
  z, ref_logp = jnp.log(P), jnp.log(REF)
  found = np.sum(P * np.asarray(estimate(z, ref_logp)))
  if mean:
    np.testing.assert_allclose(found, reverse, atol=1e-6)
  else:
    assert abs(found - reverse) > 1e-3

  def drawn(z):
    return jnp.sum(P * estimate(jax.nn.log_softmax(z), ref_logp))

  want = {
    None: np.zeros(4),
    'reverse': P * (np.log(P / REF) - reverse),
    'forward': P - REF,
  }[descends]
  np.testing.assert_allclose(jax.grad(drawn)(z), want, atol=1e-6)


@pytest.mark.parametrize('divide', [False, True])
def test_group_advantage(divide):
  rng = np.random.default_rng(0)
  returns = rng.normal(size=(5, 4)).astype(np.float32)
  want = returns - returns.mean(1, keepdims=True)
  if divide:
    want /= returns.std(1, ddof=1, keepdims=True) + 1e-4
  for weight in (1.0, 0.07):
    found = losses.group_advantage(
      returns, jnp.full((5, 4), weight), divide=divide
    )
    np.testing.assert_allclose(found, want, atol=1e-5)
  # Responses without weight are as if they were not there.
  padded = np.concatenate([np.full((5, 2), 99, np.float32), returns], axis=1)
  weight = jnp.concatenate([jnp.zeros((5, 2)), jnp.ones((5, 4))], axis=1)
  found = losses.group_advantage(padded, weight, divide=divide)
  np.testing.assert_allclose(found[:, 2:], want, atol=1e-5)
  assert not found[:, :2].any()


def test_equal_returns_have_no_advantage_at_all():
  returns = jnp.full((3, 7), 0.1) + jnp.array([[0.0], [1e3], [-7.7]])
  weight = jnp.ones((3, 7))
  found = losses.group_advantage(returns, weight, divide=True)
  assert not found.any()
  assert losses.flat(returns, weight).all()
  returns = returns.at[0, 3].add(1e-3)
  np.testing.assert_array_equal(losses.flat(returns, weight), [0, 1, 1])
  weight = weight.at[0, 3].set(0)
  assert losses.flat(returns, weight).all()
