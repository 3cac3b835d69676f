"""SLERP of task vectors, LERP and LITI in detail, as WARP needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.merge import method
from alignjax.merge.gram import angles, task_gram
from alignjax.merge.methods.linear import linear
from alignjax.merge.methods.liti import liti
from alignjax.merge.methods.slerp import coefficients
from alignjax.merge.methods.slerp import slerp as combined

ZERO = jnp.zeros(3)
ONE = jnp.array([3.0, 4.0, 0.0])
TWO = jnp.array([0.0, 1.0, 2.0])


def slerp(base, models, t=None):
  """The merge of one leaf that is a group."""
  weights = coefficients(task_gram(base, models, None), t=t)
  return combined(base, models, stats=weights, t=t)


def bits(x):
  return np.asarray(x).tobytes()


def test_slerp_golden_values():
  products = task_gram(ZERO, [ONE, TWO], None)
  np.testing.assert_allclose(angles(products), [69.036639], 1e-6)
  merged = slerp(ZERO, [ONE, TWO], t=0.5)
  np.testing.assert_allclose(merged, [1.820510, 3.034183, 1.213673], 1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(merged), 3.740792, 1e-6)
  lerp = linear(ZERO, [ONE, TWO], t=0.5)
  np.testing.assert_allclose(lerp, [1.5, 2.5, 1.0], 1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(lerp), 3.082207, 1e-6)


def test_slerp_of_three_is_recursive():
  merged = slerp(ZERO, list(jnp.eye(3)))
  np.testing.assert_allclose(merged, [0.612372, 0.612372, 0.5], atol=1e-6)


def test_slerp_of_many_follows_the_definition():
  draw = np.random.default_rng(1).normal
  base, models = draw(size=20), [draw(size=20) for _ in range(5)]
  merged = models[0] - base
  for m, model in enumerate(models[1:], start=2):
    delta = model - base
    norms = np.linalg.norm(merged) * np.linalg.norm(delta)
    angle = np.arccos(merged @ delta / norms)
    merged = (
      np.sin((1 - 1 / m) * angle) * merged + np.sin(angle / m) * delta
    ) / np.sin(angle)
  found = slerp(jnp.asarray(base), [jnp.asarray(m) for m in models])
  np.testing.assert_allclose(found, base + merged, atol=1e-5)


def test_slerp_keeps_equal_norms_and_does_not_depend_on_the_origin():
  draw = np.random.default_rng(2).normal
  base, a, b = (draw(size=50).astype(np.float32) for _ in range(3))
  b *= np.linalg.norm(a) / np.linalg.norm(b)
  for t in (0.1, 0.5, 0.8):
    merged = slerp(base, [base + a, base + b], t=t)
    np.testing.assert_allclose(
      np.linalg.norm(merged - base), np.linalg.norm(a), rtol=1e-5
    )
    assert np.linalg.norm(linear(base, [a, b], t=t)) < np.linalg.norm(a)


@pytest.mark.parametrize('other', [ONE, 2 * ONE, ONE * (1 + 1e-6), 0 * ONE])
def test_collinear_task_vectors_give_lerp(other):
  base = jnp.array([1.0, -2.0, 0.5])
  models = [base + ONE, base + other]
  for t in (0.0, 0.3, 1.0):
    np.testing.assert_allclose(
      slerp(base, models, t=t), linear(base, models, t=t), rtol=1e-5
    )


# What a product with 1 would change: signs of zeros, denormals, NaN elsewhere.
ODD = np.array([-0.0, 0.0, 1e-40, -1e-42, 1.1, 3e38, -7e-20], np.float32)


@pytest.mark.parametrize('jit', [False, True])
def test_ends_reproduce_the_models_bit_for_bit(jit):
  maybe = jax.jit if jit else lambda fn: fn
  draw = np.random.default_rng(3).normal
  base = draw(size=7).astype(np.float32)
  other = draw(size=7).astype(np.float32)
  a, b = ODD.copy(), other
  a[5] = 2.5  # its square has to be finite for an angle
  if jit:
    base, a, b = (jnp.asarray(x) for x in (base, a, b))
  at = maybe(lambda t: slerp(base, [a, b], t=t))
  assert bits(at(0.0)) == bits(a) and bits(at(1.0)) == bits(b)
  at = maybe(lambda t: slerp(base, [b, a], t=t))
  assert bits(at(1.0)) == bits(a) and bits(at(0.0)) == bits(b)
  at = maybe(lambda t: linear(base, [ODD, other], t=t))
  assert bits(at(0.0)) == bits(ODD) and bits(at(1.0)) == bits(other)
  at = maybe(lambda rate: liti(ODD, [other], liti_rate=rate))
  assert bits(at(0.0)) == bits(ODD) and bits(at(1.0)) == bits(other)
  nan = np.full(7, np.nan, np.float32)
  at = maybe(lambda rate: liti(nan, [ODD], liti_rate=rate))
  assert bits(at(1.0)) == bits(ODD)


def test_liti_is_the_straight_line():
  np.testing.assert_allclose(
    liti(ONE, [TWO], liti_rate=0.3), 0.7 * ONE + 0.3 * TWO, rtol=1e-6
  )


def test_linear_normalises_its_weights():
  merged = linear(ZERO, [ONE, TWO, ONE], weights=[1.0, 2.0, 1.0])
  np.testing.assert_allclose(merged, (ONE + TWO) / 2, rtol=1e-6)
  merged = linear(ZERO, [ONE, TWO, ZERO])
  np.testing.assert_allclose(merged, (ONE + TWO) / 3, rtol=1e-6)


def test_inner_products_are_accurate_in_float32():
  x = np.random.default_rng(4).normal(size=(2048, 2048)).astype(np.float32)
  found = jax.jit(lambda x: task_gram(jnp.zeros_like(x), [x], None))(x)
  exact = np.sum(x.astype(np.float64) ** 2)
  np.testing.assert_allclose(found[0, 0], exact, rtol=1e-6)


@pytest.mark.parametrize('tilt', [0.0, 5e-4])
def test_opposite_task_vectors_have_no_slerp(tilt):
  b = jnp.array([-np.cos(tilt), np.sin(tilt), 0.0])
  products = task_gram(ZERO, [jnp.eye(3)[0], b], None)
  assert np.isnan(coefficients(products, t=0.5)).all()
  with pytest.raises(UserError, match="opposite.*group 'layer_3'"):
    method.check_total(method.method('slerp'), 'layer_3', products)


def test_nearly_opposite_task_vectors_have_one():
  b = jnp.array([-np.cos(2e-2), np.sin(2e-2), 0.0])
  models = [jnp.eye(3)[0], b]
  products = task_gram(ZERO, models, None)
  method.check_total(method.method('slerp'), 'g', products)
  np.testing.assert_allclose(
    jnp.linalg.norm(slerp(ZERO, models, t=0.5)), 1, rtol=1e-3
  )


def test_groups():
  group = method.group_of
  assert group('layer_7/attn/q', 'layer') == 'layer_7'
  assert group('layer_17/ffw/gate', 'layer') == 'layer_17'
  assert group('vision/layer_3/attn/q', 'layer') == 'vision/layer_3'
  assert group('embed/table', 'layer') == 'embed'
  assert group('final_norm/scale', 'layer') == 'final_norm'
  assert group('layer_7/attn/q', 'tensor') == 'layer_7/attn/q'
  assert group('layer_7/attn/q', 'all') == group('embed', 'all')
  with pytest.raises(UserError, match="not 'block'"):
    group('embed', 'block')
