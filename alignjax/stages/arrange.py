"""Rearranging a batch: choosing responses, turning returns into advantages.

And whether a recipe's numbers make sense, before anything runs.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignjax.core.errors import UserError
from alignjax.core.types import Batch
from alignjax.losses.policy_gradient import BASELINES, leave_one_out

PER_RESPONSE = (
  'response mask sample_logp ref_logp value returns advantage rewards reward'
  ' weight'
).split()


def choose(batch: Batch, columns: Int[Array, 'B M']) -> Batch:
  """The batch with responses `columns[b]` of each row b, in that order."""

  def gather(x):
    index = columns.reshape(*columns.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)

  return batch | {
    name: gather(batch[name]) for name in PER_RESPONSE if name in batch
  }


def first(batch: Batch, count: int) -> Batch:
  """The batch with its `count` leading responses only."""
  return batch | {
    name: batch[name][:, :count] for name in PER_RESPONSE if name in batch
  }


def advantage(
  returns: Float[Array, 'B N'], batch: Batch, *, baseline: str
) -> Float[Array, 'B N R']:
  """returns - baseline, on every token of the response.

  baseline: 'leave_one_out' or 'none'. Batch rows are those of `returns`.
  """
  if baseline == 'leave_one_out':
    returns = returns - leave_one_out(returns, batch['weight'])
  return returns[..., None] * batch['mask']


def check_baseline(baseline: str) -> None:
  """UserError unless `baseline` names one."""
  check_choice('baseline', baseline, BASELINES)


def check_choice(name: str, found: str, choices: Sequence[str]) -> None:
  """UserError unless a recipe's word is one of `choices`."""
  if found not in choices:
    raise UserError(
      f'recipe.{name}: found {found!r}, expected one of {list(choices)}'
    )


def check_numbers(**fields: tuple[float, float, float]) -> None:
  """UserError unless least <= found <= most, for name=(found, least, most)."""
  for name, (found, least, most) in fields.items():
    if not least <= found <= most:  # NaN is out of every range
      bounds = f'{least:g} or more'
      if most < math.inf:
        bounds = f'a number from {least:g} to {most:g}'
      raise UserError(f'recipe.{name}: found {found:g}, expected {bounds}')


def check_ratios(
  *,
  kl_coef: float,
  clip_low: float,
  clip_high: float,
  updates: int,
  temperature: float,
) -> None:
  """UserError unless what every recipe with clipped ratios has makes sense."""
  check_numbers(
    kl_coef=(kl_coef, 0, math.inf),
    clip_low=(clip_low, 1e-6, 1),
    clip_high=(clip_high, 1e-6, math.inf),
    updates=(updates, 1, math.inf),
    temperature=(temperature, 1e-6, math.inf),
  )
