"""Values of a response under way: advantages, targets, and their regression.

Responses are masked; a mask is True up to the last token and False after it.
What lies behind the end counts as 0, whether a stop token or the length limit
ended the response.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignjax.core.types import Batch, Bundle, Scalar


def gae(
  rewards: Float[Array, '... R'],
  value: Float[Array, '... R'],
  mask: Bool[Array, '... R'],
  *,
  gamma: float,
  gae_lambda: float,
) -> Float[Array, '... R']:
  """Generalised advantage estimates, 0 where the mask is False.

  A_t = delta_t + gamma gae_lambda A_{t+1}, with
  delta_t = r_t + gamma V_{t+1} - V_t (arXiv 1506.02438, equation 16). `value`
  at t is of what precedes token t; A + V is the return that it estimates.
  """
  rewards, value = jnp.where(mask, rewards, 0.0), jnp.where(mask, value, 0.0)
  following = jnp.pad(value[..., 1:], [(0, 0)] * (value.ndim - 1) + [(0, 1)])
  delta = rewards + gamma * following - value

  def back(later, delta):
    now = delta + gamma * gae_lambda * later
    return now, now

  time_first = jnp.moveaxis(delta, -1, 0)
  zero = jnp.zeros_like(time_first[0])
  _, advantage = jax.lax.scan(back, zero, time_first, reverse=True)
  return jnp.where(mask, jnp.moveaxis(advantage, 0, -1), 0.0)


def whiten(
  x: Float[Array, '...'], weight: Float[Array, '...'], *, epsilon: float = 1e-8
) -> Float[Array, '...']:
  """x with weighted mean 0 and variance 1; 0 where the weight is 0.

  `epsilon` is added to the variance.
  """
  share = weight / jnp.maximum(jnp.sum(weight), 1e-30)
  centred = x - jnp.sum(share * x)
  variance = jnp.sum(share * jnp.square(centred))
  scaled = centred * jax.lax.rsqrt(variance + epsilon)
  return jnp.where(weight > 0, scaled, 0.0)


def clipped_square(
  value: Float[Array, '...'],
  old_value: Float[Array, '...'],
  returns: Float[Array, '...'],
  *,
  clip_value: float,
) -> Float[Array, '...']:
  """The larger of (V - returns)^2 / 2, V as it is and V near `old_value`.

  Near is within `clip_value`; only `value` gets a gradient.
  """
  old_value, returns = jax.lax.stop_gradient((old_value, returns))
  near = old_value + jnp.clip(value - old_value, -clip_value, clip_value)
  plain, kept = jnp.square(value - returns), jnp.square(near - returns)
  return jnp.maximum(plain, kept) / 2


def last(mask: Bool[Array, '... R']) -> Bool[Array, '... R']:
  """True on the last token of each response only."""
  following = jnp.pad(mask[..., 1:], [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
  return mask & ~following


def of_response(
  scalar: Scalar, bundle: Bundle, batch: Batch
) -> Float[Array, 'B N']:
  """The number of prompt and whole response, its last token included.

  A scalar reads what precedes a token, so one more is laid behind the longest.
  """
  wide = ((0, 0), (0, 0), (0, 1))
  longer = {name: jnp.pad(batch[name], wide) for name in ('response', 'mask')}
  length = jnp.sum(batch['mask'], axis=-1, keepdims=True)
  found = scalar(bundle, batch | longer)
  return jnp.take_along_axis(found, length, axis=-1)[..., 0]
