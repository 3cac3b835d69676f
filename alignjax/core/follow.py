"""How a frozen role follows a trained one: by copies, by a moving average.

Rules of motion only; which role moves is a recipe's business.
"""

import jax
import jax.numpy as jnp

from alignjax.core import tree
from alignjax.core.errors import UserError
from alignjax.core.types import Follow


def ema(rate: float, leader: str = 'policy') -> Follow:
  """After every step, me = (1 - rate) me + rate leader, in float32."""
  return Follow(leader, lambda step, new, me: tree.lerp(me, new, rate))


def every(period: int, leader: str = 'policy') -> Follow:
  """A copy of the leader after steps period, 2 period, ...; else no motion."""

  def copy(step, new, me):
    due = (step % period) == 0
    return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, me)

  return Follow(leader, copy)


def anchor(*, anchor_period: int, ema_rate: float) -> Follow | None:
  """The motion that a recipe's two numbers ask for; 0 and 0 is a fixed role.

  Raises UserError where both are set, or one is out of range.
  """
  if anchor_period < 0:
    raise UserError(
      f'recipe.anchor_period: found {anchor_period}, expected 0 (no copies) or '
      'a number of steps'
    )
  if not 0 <= ema_rate <= 1:
    raise UserError(
      f'recipe.ema_rate: found {ema_rate:g}, expected a number from 0 to 1'
    )
  if anchor_period and ema_rate:
    raise UserError(
      f'recipe.anchor_period = {anchor_period} and recipe.ema_rate = '
      f'{ema_rate:g}: the anchor moves by copies or by a moving average, so '
      'set one of them to 0'
    )
  if anchor_period:
    return every(anchor_period)
  return ema(ema_rate) if ema_rate else None
