import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core import follow
from alignjax.core.errors import UserError

OLD, NEW = {'w': jnp.zeros(2)}, {'w': jnp.full(2, 8.0)}


def moved(rule, step):
  return float(rule.fn(jnp.int32(step), NEW, OLD)['w'][0])


def test_copies_come_on_multiples_of_the_period():
  rule = follow.anchor(anchor_period=3, ema_rate=0.0)
  assert [moved(rule, step) for step in (1, 2, 3, 4, 6)] == [0, 0, 8, 0, 8]
  assert rule.leader == 'policy'


def test_a_moving_average_gives_the_new_value_its_rate():
  rule = follow.anchor(anchor_period=0, ema_rate=0.25)
  assert moved(rule, 1) == moved(rule, 7) == 2
  assert moved(follow.ema(1.0), 1) == 8


def test_a_small_rate_moves_in_float32():
  old = {'w': jnp.ones(1)}
  new = {'w': jnp.full(1, 1.001)}
  out = follow.ema(0.02).fn(jnp.int32(1), new, old)
  np.testing.assert_allclose(out['w'] - 1, 2e-5, rtol=0.01)


def test_no_numbers_is_no_motion():
  assert follow.anchor(anchor_period=0, ema_rate=0.0) is None


@pytest.mark.parametrize(
  'period, rate, words',
  [
    (10, 0.1, 'anchor_period = 10 and recipe.ema_rate = 0.1'),
    (-2, 0.0, 'recipe.anchor_period: found -2'),
    (0, 1.01, 'recipe.ema_rate: found 1.01'),
    (0, float('nan'), 'recipe.ema_rate: found nan'),
  ],
)
def test_bad_numbers(period, rate, words):
  with pytest.raises(UserError, match=words):
    follow.anchor(anchor_period=period, ema_rate=rate)
