"""Policies made of policies: every result is again a Policy.

Sampler and scorers therefore never know what they are given. `restrict` goes
outermost, so combinations are made of bare policies (`under_guidance`): a
difference of logits, one of which is masked, may make an illegal token certain.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.core.types import Batch, Model, Policy, UserError

PROMPTS = ('prompt', 'uncond')
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


def guided(policy: Policy, guidance_scale: float) -> Policy:
  """Classifier-free guidance: scale l(. | prompt) + (1 - scale) l(. | uncond).

  Equation 1 of arXiv 2410.06084, on raw logits l. Scale 1 is `policy`, 0 is
  `policy` on the negative prompt `uncond`, more than 1 leads away from it. Both
  read the same response. They are rows 2b and 2b + 1 of one batch with one
  cache, so that a decoded token reads the weights once.
  """

  def mix(logits):
    with_prompt, without = logits
    return guidance_scale * with_prompt + (1 - guidance_scale) * without

  def split(x):
    """[2 B, *] -> (its even rows, its odd rows)."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]

  def features(weights, batch):
    x, aux = policy.features(weights, _in_pairs(batch))
    # A pair for each array of features, as over_tokens walks any pytree.
    leaves, form = jax.tree.flatten(x)
    parts = zip(*(split(leaf) for leaf in leaves))
    return tuple(jax.tree.unflatten(form, part) for part in parts), aux

  def head(weights, x):
    return mix(tuple(policy.head(weights, part) for part in x))

  def start(weights, batch, length):
    logits, cache = policy.start(weights, _in_pairs(batch), length)
    return mix(split(logits)), cache

  def step(weights, cache, tokens):
    logits, cache = policy.step(weights, cache, jnp.repeat(tokens, 2))
    return mix(split(logits)), cache

  def take(cache, rows):
    pairs = jnp.stack([2 * rows, 2 * rows + 1], axis=1)
    return policy.take(cache, pairs.reshape(-1))

  return Policy(policy.view, features, head, start, step, take)


def under_guidance(model: Model, role: str, guidance_scale: float) -> Policy:
  """A model's role under guidance, over legal tokens; 1 needs no `uncond`."""
  if guidance_scale == 1:
    return model.policy(role)
  return model.legal(guided(model.bare(role), guidance_scale))


def _in_pairs(batch: Batch) -> Batch:
  """Every row twice, the second time with `uncond` for its prompt."""
  found = {name: batch[name].shape for name in batch if name in PROMPTS}
  if sorted(found) != sorted(PROMPTS) or len(set(found.values())) > 1:
    raise UserError(
      'guidance needs prompts and negative prompts of one width (batch fields '
      f"{PROMPTS}), found {found}; source 'sources.prompts' gives them where "
      'source.uncond is a text, or empty for none'
    )
  pairs = jnp.stack([batch[name] for name in PROMPTS], axis=1)
  out = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items()}
  return out | {'prompt': pairs.reshape(-1, pairs.shape[-1])}
