"""Divergences against closed forms, and sparse ones against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from alignjax.core.errors import UserError
from alignjax.losses import divergence
from alignjax.losses.divergence import jensen_shannon, kl, reverse, sparse

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 5, 11)) * 2
P, Q = log_softmax(A, -1), log_softmax(B, -1)


def dense_jensen_shannon(p, q, mix):
  m = np.logaddexp(p + np.log(mix), q + np.log1p(-mix))
  to_p = (np.exp(p) * (p - m)).sum(-1)
  return mix * to_p + (1 - mix) * (np.exp(q) * (q - m)).sum(-1)


def test_directions_against_float64():
  forward = (np.exp(P) * (P - Q)).sum(-1)
  backward = (np.exp(Q) * (Q - P)).sum(-1)
  assert np.abs(forward - backward).min() > 1e-2
  np.testing.assert_allclose(kl(A, B), forward, rtol=1e-5)
  np.testing.assert_allclose(reverse(A, B), backward, rtol=1e-5)


@pytest.mark.parametrize('mix', [0.1, 0.5, 0.9])
def test_jensen_shannon(mix):
  found = jensen_shannon(A, B, mix)
  np.testing.assert_allclose(found, dense_jensen_shannon(P, Q, mix), rtol=1e-5)
  # Swapping arguments and weights changes nothing; it is bounded.
  np.testing.assert_allclose(found, jensen_shannon(B, A, 1 - mix), rtol=1e-5)
  bound = -mix * np.log(mix) - (1 - mix) * np.log(1 - mix)
  assert np.all(found <= bound) and np.all(found >= 0)
  np.testing.assert_allclose(jensen_shannon(A, A, mix), 0, atol=1e-6)


def test_jensen_shannon_of_disjoint_arms_is_its_bound():
  p, q = jnp.array([0.0, -1e9]), jnp.array([-1e9, 0.0])
  np.testing.assert_allclose(jensen_shannon(p, q, 0.5), np.log(2), rtol=1e-6)
  # Two arms by hand: p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4).
  hand = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
  even = jnp.zeros(2)
  np.testing.assert_allclose(jensen_shannon(p, even, 0.5), hand, rtol=1e-6)


def test_limits_of_the_mix():
  # Float32 rounding is divided by mix: of several, the closest tells.
  with jax.enable_x64(False):
    for mix in (3e-3, 1e-3):
      scale = mix * (1 - mix)
      low = np.asarray(jensen_shannon(A, B, mix)) / scale
      high = np.asarray(jensen_shannon(A, B, 1 - mix)) / scale
      np.testing.assert_allclose(low, kl(A, B), rtol=20 * mix)
      np.testing.assert_allclose(high, reverse(A, B), rtol=20 * mix)
  for mix in (1e-6, 1e-8):
    exact = dense_jensen_shannon(P, Q, mix) / mix
    np.testing.assert_allclose(exact, kl(A, B), rtol=1e-4)


@pytest.mark.parametrize('mix', [0.1, 0.5, 0.9])
def test_gradients_by_hand(mix):
  p, q = np.exp(P[0]), np.exp(Q[0])
  m = mix * p + (1 - mix) * q
  hand = {
    'forward': q - p,
    'reverse': q * (Q[0] - P[0] - (q * (Q[0] - P[0])).sum()),
    'jensen_shannon': (1 - mix)
    * q
    * (np.log(q / m) - (q * np.log(q / m)).sum()),
  }
  for name, want in hand.items():
    fn = divergence.named(name, mix)
    found = jax.grad(lambda z, fn=fn: fn(jnp.asarray(A[0]), z))(
      jnp.asarray(B[0])
    )
    np.testing.assert_allclose(found, want, atol=1e-6)


IDS = np.stack([RNG.permutation(11)[:4] for _ in range(5)])
GIVEN = np.take_along_axis(A, IDS, -1)


def scattered():
  p = np.full((5, 11), -1e9)
  np.put_along_axis(p, IDS, GIVEN, -1)
  return p


@pytest.mark.parametrize('name', ['forward', 'jensen_shannon'])
def test_sparse_is_dense_with_zeros(name):
  fn = divergence.named(name, 0.3)

  def few(z):
    return fn(*sparse(IDS, GIVEN, z, restricted=False))

  dense = fn(scattered(), B)
  np.testing.assert_allclose(few(B), dense, rtol=1e-5)
  grads = [
    jax.grad(lambda z, f=f: f(z).sum())(jnp.asarray(B))
    for f in (few, lambda z: fn(scattered(), z))
  ]
  np.testing.assert_allclose(*grads, atol=1e-6)


@pytest.mark.parametrize('name', divergence.NAMES)
def test_restricted_sees_its_ids_only(name):
  fn = divergence.named(name, 0.3)
  q = np.take_along_axis(B, IDS, -1)
  found = fn(*sparse(IDS, GIVEN, B, restricted=True))
  np.testing.assert_allclose(found, fn(GIVEN, q), rtol=1e-5)


@pytest.mark.parametrize('restricted', [False, True])
def test_unused_slots_are_no_outcomes(restricted):
  ids = np.concatenate([IDS, IDS[:, :1], np.zeros_like(IDS[:, :1])], -1)
  unused = np.full((5, 2), divergence.ABSENT)
  given = np.concatenate([GIVEN, unused], -1)
  for name in ('forward', 'jensen_shannon'):
    fn = divergence.named(name, 0.3)
    found = fn(*sparse(ids, given, B, restricted=restricted))
    want = fn(*sparse(IDS, GIVEN, B, restricted=restricted))
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert np.all(np.isfinite(found))


def test_ids_that_have_everything_leave_no_nan():
  p = scattered()
  found = jensen_shannon(*sparse(IDS, GIVEN, p, restricted=False), 0.5)
  np.testing.assert_allclose(found, 0, atol=1e-6)
  grad = jax.grad(
    lambda z: jensen_shannon(*sparse(IDS, GIVEN, z, restricted=False)).sum()
  )(jnp.asarray(p))
  assert np.all(np.isfinite(grad))
  total = logsumexp(np.take_along_axis(A, IDS, -1), axis=-1)
  assert np.all(np.isfinite(total))


def test_bad_names_and_shares():
  with pytest.raises(UserError, match="found 'forwards', expected one of"):
    divergence.named('forwards', 0.5)
  for mix in (0.0, 1.0, -1.0):
    with pytest.raises(UserError, match='recipe.mix'):
      divergence.named('jensen_shannon', mix)
