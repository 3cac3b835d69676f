"""Policies made of policies: every result is again a Policy.

Sampler and scorers therefore never know what they are given. `restrict` goes
outermost: masked logits inside a combination would turn into NaN.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from alignjax.core.types import Policy

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
