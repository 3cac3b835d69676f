"""Policies made of policies: every result is again a Policy.

Sampler and scorers therefore never know what they are given. `restrict` goes
outermost: masked logits inside a combination would turn into NaN.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.types import Policy, UserError

ILLEGAL = -1e9  # finite: its exponential is 0 and its multiples are numbers


def restrict(policy: Policy, illegal: Sequence[int]) -> Policy:
  """`policy` over legal tokens: `illegal` ids get the logit -1e9."""
  if not illegal:
    return policy

  def mask(logits):
    # A constant mask fuses with whatever follows; a scatter would copy.
    forbidden = np.zeros(logits.shape[-1], bool)
    forbidden[np.asarray(illegal)] = True
    return jnp.where(forbidden, ILLEGAL, logits)

  return on_logits(policy, mask)


def tempered(policy: Policy, temperature: float) -> Policy:
  """`policy` at a sampling temperature, for sampler and scorer alike."""
  if temperature == 1:
    return policy
  return on_logits(policy, lambda logits: logits / temperature)


def sampled(
  policy: Policy, *, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Policy:
  """`policy` as it is sampled: at a temperature, then truncated.

  Only the `top_k` likeliest tokens (0: all), and of those the fewest that have
  at least `top_p` of their mass, can be drawn, and share all the mass; tokens
  as likely as the last of them belong to them. Scorers do the same, so that
  log-probabilities are those of the distribution that was sampled. A token that
  was drawn counts as drawable where a scorer disagrees: another policy, or one
  that has moved, or rounding.

  Raises UserError for numbers out of range.
  """
  if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
    raise UserError(
      f'temperature = {temperature:g}, top_k = {top_k} and top_p = {top_p:g}: '
      'expected more than 0, 0 or more (0: all), and more than 0 up to 1'
    )
  policy = tempered(policy, temperature)
  if not top_k and top_p == 1:
    return policy

  def limit(logits, tokens):
    kept = _kept(jax.lax.stop_gradient(logits), top_k, top_p)
    if tokens is not None:
      kept |= jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.where(kept, logits, ILLEGAL)

  return policy._replace(limit=limit)


def _kept(logits, top_k: int, top_p: float):
  """bool [..., V]: the likeliest tokens."""
  kept = jnp.ones(logits.shape, bool)
  if top_k and top_k < logits.shape[-1]:
    kept = logits >= jax.lax.top_k(logits, top_k)[0][..., -1:]
  if top_p < 1:
    probs = jax.nn.softmax(jnp.where(kept, logits, ILLEGAL), axis=-1)
    kept &= probs >= _nucleus(probs, top_p)
  return kept


def _nucleus(probs, top_p: float):
  """The largest threshold at which what reaches it has mass `top_p`.

  float32 [..., 1]. Found by bisection over the bits of the numbers, which are
  ordered as they are: 31 sums, where sorting 256k tokens would move them.
  """

  def halve(_, ends):
    low, high = ends
    middle = low + (high - low) // 2
    threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
    mass = jnp.sum(
      jnp.where(probs >= threshold, probs, 0.0), axis=-1, keepdims=True
    )
    enough = mass >= top_p
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  largest = jnp.max(probs, axis=-1, keepdims=True)
  high = jax.lax.bitcast_convert_type(largest, jnp.int32) + 1
  low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
  return jax.lax.bitcast_convert_type(low, jnp.float32)


def on_logits(policy: Policy, fn: Callable) -> Policy:
  """`policy` with `fn` applied to all its logits."""

  def start(weights, batch, length):
    logits, cache = policy.start(weights, batch, length)
    return fn(logits), cache

  def step(weights, cache, tokens):
    logits, cache = policy.step(weights, cache, tokens)
    return fn(logits), cache

  return policy._replace(
    head=lambda weights, x: fn(policy.head(weights, x)), start=start, step=step
  )
