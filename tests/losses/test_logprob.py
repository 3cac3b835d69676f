"""Token scores: chunks change nothing, masks and shifts are in one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from alignjax.losses.divergence import kl
from alignjax.losses.logprob import targets, token_logp, token_scores
from alignjax.losses.policy_gradient import leave_one_out
from alignjax.models import decoder
from tests import tiny

MODEL = tiny.model()
POLICY = MODEL.policy('policy')
BUNDLE = tiny.bundle(MODEL, 'policy')
WEIGHTS = POLICY.view(BUNDLE, {})


def plain():
  rng = np.random.default_rng(0)
  return {
    'tokens': jnp.asarray(rng.integers(6, 262, (2, 23))),
    'loss_mask': jnp.asarray(rng.integers(0, 2, (2, 23)), bool),
    'segment': jnp.asarray([[1] * 10 + [2] * 13, [1] * 20 + [0] * 3]),
    'position': jnp.asarray(
      [[*range(10), *range(13)], [*range(20), -1, -1, -1]]
    ),
  }


@pytest.mark.parametrize('chunk', [1, 4, 7, 22, 256])
def test_chunks_change_neither_value_nor_gradient(chunk):
  batch = plain()

  def total(params, chunk):
    weights = POLICY.view({'policy': params}, batch)
    return token_logp(POLICY, weights, batch, chunk=chunk).sum()

  fn = jax.jit(jax.value_and_grad(total), static_argnums=1)
  value, grads = fn(BUNDLE['policy'], chunk)
  want, want_grads = fn(BUNDLE['policy'], 1000)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def test_logits_at_t_score_token_t_plus_1():
  batch = plain()
  config = tiny.config()
  raw = decoder.apply(
    config,
    BUNDLE['policy'],
    batch['tokens'],
    batch['position'],
    batch['segment'],
  )
  illegal = [*tiny.TOKENS.illegal, *range(tiny.TOKENS.size, 272)]
  raw = np.array(raw, np.float64)
  raw[..., illegal] = -1e9
  logp = log_softmax(raw, axis=-1)
  tokens = np.asarray(batch['tokens'])
  got = np.asarray(token_logp(POLICY, WEIGHTS, batch))
  _, mask = targets(batch)
  for b, t in np.argwhere(np.asarray(mask)):
    np.testing.assert_allclose(
      got[b, t], logp[b, t, tokens[b, t + 1]], atol=1e-5
    )
  assert not got[~np.asarray(mask)].any()


def test_the_first_token_of_a_document_is_not_predicted_from_another():
  _, mask = targets(plain() | {'loss_mask': jnp.ones((2, 23), bool)})
  assert not mask[0, 9] and mask[0, 8] and mask[0, 10]
  assert not mask[1, 19]


def test_entropy_and_kl_against_float64():
  rng = np.random.default_rng(1)
  a, b = rng.normal(size=(2, 5, 11)) * 3
  p, q = log_softmax(a, -1), log_softmax(b, -1)
  np.testing.assert_allclose(kl(a, b), (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
  np.testing.assert_allclose(kl(a, a), 0, atol=1e-6)
  batch = tiny.batch(2) | {
    'response': jnp.full((2, 1, 4), 20),
    'mask': jnp.ones((2, 1, 4), bool),
  }
  _, nats = token_scores(POLICY, WEIGHTS, batch)
  features, _ = POLICY.features(WEIGHTS, batch)
  logp = log_softmax(np.asarray(POLICY.head(WEIGHTS, features)), -1)
  np.testing.assert_allclose(nats, -(np.exp(logp) * logp).sum(-1), rtol=1e-4)


def test_leave_one_out_uses_the_others_only():
  returns = jnp.array([[1.0, 2.0, 6.0]])
  np.testing.assert_allclose(
    leave_one_out(returns, jnp.ones((1, 3))), [[4.0, 3.5, 1.5]]
  )
  column = jnp.array([[1.0], [2.0], [6.0]])
  np.testing.assert_allclose(
    leave_one_out(column, jnp.ones((3, 1))), [[4.0], [3.5], [1.5]]
  )
  assert leave_one_out(jnp.ones((1, 1)), jnp.ones((1, 1))) == 0
