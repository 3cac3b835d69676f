"""Semi-hard triplets: which negative is chosen, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import contrastive
from alignjax.losses.contrastive import semi_hard_triplets


def at(*degrees):
  """One row of unit vectors in the plane."""
  angle = np.deg2rad(degrees)
  return jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1)[None])


def apart(degrees):
  return 1 - np.cos(np.deg2rad(degrees))


def of_first(degrees, margin=0.2):
  found = semi_hard_triplets(at(*degrees), margin)
  return {name: float(x[0, 0]) for name, x in found._asdict().items()}


def test_the_nearest_beyond_the_partner_is_the_negative():
  # Anchor 0, partner at 30: 20 is nearer, 40 is semi-hard, 90 is easy.
  found = of_first([0, 30, 20, 40, 90, 91])
  assert found['positive'] == pytest.approx(apart(30), abs=1e-6)
  assert found['negative'] == pytest.approx(apart(40), abs=1e-6)
  expected = 0.2 + apart(30) - apart(40)
  assert found['loss'] == pytest.approx(expected, abs=1e-6) and expected > 0
  assert not found['first']


def test_beyond_the_margin_nothing_is_paid():
  found = of_first([0, 10, 90, 100])
  assert found['negative'] == pytest.approx(apart(90), abs=1e-6)
  assert found['loss'] == 0 and found['first']


def test_where_there_is_no_semi_hard_one_the_farthest_nearer_is_taken():
  found = of_first([0, 80, 10, 30])
  assert found['negative'] == pytest.approx(apart(30), abs=1e-6)
  expected = 0.2 + apart(80) - apart(30)
  assert found['loss'] == pytest.approx(expected, abs=1e-6)
  assert expected > 0.2 and not found['first']


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('margin', [0.1, 0.7])
def test_against_a_loop(margin, seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(3, 8, 4))
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  found = semi_hard_triplets(jnp.asarray(x), margin)
  kinds = set()
  for b in range(3):
    distance = 1 - x[b] @ x[b].T
    for i in range(8):
      partner = i + 1 if i % 2 == 0 else i - 1
      near = distance[i, partner]
      others = [distance[i, j] for j in range(8) if j not in (i, partner)]
      beyond = [d for d in others if d > near]
      kinds.add(bool(beyond))
      negative = min(beyond) if beyond else max(others)
      loss = max(0.0, margin + near - negative)
      np.testing.assert_allclose(found.loss[b, i], loss, atol=1e-5)
      assert bool(found.first[b, i]) == (near < min(others))
  assert kinds == {True, False}


def test_rows_do_not_see_each_other():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 4))
  x = jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))
  whole = semi_hard_triplets(x, 0.3).loss
  for b in range(2):
    alone = semi_hard_triplets(x[b : b + 1], 0.3).loss
    np.testing.assert_allclose(whole[b], alone[0], atol=1e-6)


def test_the_gradient_pulls_the_pair_together():
  def loss(angles):
    x = jnp.stack([jnp.cos(angles), jnp.sin(angles)], -1)[None]
    return contrastive.semi_hard_triplets(x, 0.2).loss[0, 0]

  grad = jax.grad(loss)(jnp.deg2rad(jnp.array([0.0, 30.0, 40.0, 90.0])))
  # Partner at 30 comes nearer, the negative at 40 goes away, the rest rests.
  np.testing.assert_allclose(
    grad[1:], [np.sin(np.deg2rad(30)), -np.sin(np.deg2rad(40)), 0], atol=1e-6
  )
